import a_package_that_is_not_installed


def build_model():
    return a_package_that_is_not_installed.Model()
