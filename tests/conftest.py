"""Options of the whole test suite."""


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="also the long repeats: 100 updates of each layout")
