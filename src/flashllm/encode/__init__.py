# SPDX-License-Identifier: Apache-2.0
"""Encoders that run on the device; the host encoders are in ``flashllm.formats``."""
