# `make test-hosts` runs the tests of the adapters inside the real trainers, on the CPU. Each trainer has an environment of
# its own, because their pins conflict; OpenRLHF, SkyRL and AReaL share one, because their hooks import little of what they
# pin. requirements/HOST.txt lists every package of an environment. torch is installed first, so that no package chooses
# another version of it.
HOSTS := trl verl vllm others
TESTS_trl := trl trl_rewards trl_dpo trl_sft trl_head tree_row
TESTS_verl := verl verl_gates verl_head
TESTS_vllm := vllm vllm_train vllm_teacher
TESTS_others := openrlhf skyrl areal tinker verifiers
ENVIRONMENTS := $(HOSTS) bench

.PHONY: test-hosts $(HOSTS:%=test-%)

$(ENVIRONMENTS:%=.venv-%/tools): .venv-%/tools: requirements/%.txt
	rm -rf .venv-$*
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/pip install -q -U pip
	.venv-$*/bin/pip install -q torch==2.13.0
	.venv-$*/bin/pip install -q --no-deps -r $<
	touch $@

$(ENVIRONMENTS:%=.venv-%/installed): .venv-%/installed: .venv-%/tools build/wheel/built
	.venv-$*/bin/pip install -q --no-deps --force-reinstall build/wheel/*.whl
	touch $@

$(HOSTS:%=test-%): test-%: .venv-%/installed
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 .venv-$*/bin/python -m pytest -o filterwarnings=default $(patsubst %,tests/adapters/test_%.py,$(or $(TESTS_$*),$*)) $(ARGS)

test-hosts: $(HOSTS:%=test-%)
