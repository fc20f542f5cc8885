"""How long hypothesis looks: a few hundred fixed examples, some under `brief`, 10,000 random ones under `fuzz`."""

from hypothesis import HealthCheck, settings

_COMMON = {'deadline': None, 'suppress_health_check': [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile('quick', max_examples=200, derandomize=True, database=None, **_COMMON)
settings.register_profile('brief', max_examples=40, derandomize=True, database=None, **_COMMON)
settings.register_profile('fuzz', max_examples=10_000, print_blob=True, **_COMMON)
settings.load_profile('quick')
