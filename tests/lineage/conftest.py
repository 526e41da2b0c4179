from tests.lifecycle.test_own_project import environment

__all__ = ["environment"]
