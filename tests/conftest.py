"""Settings of every test: a shared machine makes hypothesis' time limits flaky, so it has none."""

from hypothesis import settings

settings.register_profile("rotrl", deadline=None, max_examples=50)
settings.load_profile("rotrl")
