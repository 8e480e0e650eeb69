def pytest_addoption(parser):
    parser.addoption("--rewrite", action="store_true", help="write the scenario scripts' outputs anew")
