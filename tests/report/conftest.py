import pytest


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    import chromium

    browser = chromium.Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.driver.quit()


@pytest.fixture(autouse=True)
def nothing_on_the_console(request):
    yield
    if "browser" in request.fixturenames:
        assert request.getfixturevalue("browser").errors() == []
