# SPDX-License-Identifier: Apache-2.0
"""Cases x systems -> timing -> rows -> tables. ``docs/measurement.md`` explains the method and the reasons for it."""
