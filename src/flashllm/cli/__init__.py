# SPDX-License-Identifier: Apache-2.0
"""Command line. Every module here other than ``main`` and ``_*`` is one command.

``cli/NAME.py`` holds a click command (or group) called ``command`` and becomes ``flashllm NAME``,
underscores turned into dashes. The first line of the module's docstring is its line in
``flashllm --help``, which reads it without importing the module.
"""
