# SPDX-License-Identifier: Apache-2.0
"""Cases x systems -> timing -> rows -> tables. ``docs/measurement.md`` says how and why it measures so."""
