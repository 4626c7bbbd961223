"""Property tests have no deadline: a busy machine is no failure."""

import hypothesis

hypothesis.settings.register_profile("postquant", deadline=None)
hypothesis.settings.load_profile("postquant")
