"""Settings of the whole test run."""

from __future__ import annotations

import hypothesis

# A shared machine stalls for longer than any sensible deadline; pytest-timeout guards the test.
hypothesis.settings.register_profile("hexswarm", deadline=None)
hypothesis.settings.load_profile("hexswarm")
