# SPDX-License-Identifier: Apache-2.0
"""Language models: what a configuration says, which layers they have, and what they compute."""
