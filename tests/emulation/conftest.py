import pytest


@pytest.fixture(scope="module")
def emulator(request):
    """The emulator, for tests that count what kernels do."""
    plugin = request.config.pluginmanager.get_plugin("tests.emulation.plugin")
    if plugin is None:
        pytest.skip("counted on the emulator: make test-emulated")
    return plugin.emulator
