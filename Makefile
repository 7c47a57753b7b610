# You need Python with venv and its headers, a C++ compiler and make. The rest is installed in .venv.
## make demo       train on handwritten digits
## make test       run every test
## make test-tensorflow   test Keras on TensorFlow, in .venv-tensorflow, where there is no torch
## make lint       check style and types
## make format     correct the style
## make sanitize   run the CUDA kernels, emulated on the CPU, under ASan and UBSan
## make racecheck  the same under ThreadSanitizer: no data races
## make bench      compare the step's speed with torch's and other libraries'; BENCH=... for pytest
## make peers      install the other libraries: DeepSpeed, bitsandbytes, optimi, torchao
## make bench-report   draw charts and write tables from benchmarks/results
## make docs       build the documentation in build/site; a warning or a broken link is an error
## make wheel      build a wheel in dist/; TORCHES="2.12.0 ..." adds bindings for more versions of torch
## make clean      remove everything that was built, and .venv
##
## PYTHON=path     use this interpreter and its torch, and install nothing
## TORCH=...       install another torch in .venv, in pip's notation
## FUSEDOPT_CUDA=  0 leaves the CUDA kernels out, 1 builds them without a GPU too. By default the
##                 build needs nvcc and a GPU for them; `make test` needs only nvcc

TORCH ?= torch==2.13.0

# Tests compile and check the CUDA kernels without a GPU too. Later targets use the same build.
nvcc := $(or $(wildcard $(or $(CUDA_HOME),$(CUDA_PATH),/usr/local/cuda)/bin/nvcc),$(shell command -v nvcc))
ifeq ($(FUSEDOPT_CUDA),)
  ifneq ($(and $(nvcc),$(or $(filter test,$(MAKECMDGOALS)),$(wildcard build/with-cuda))),)
    export FUSEDOPT_CUDA := 1
  endif
endif

ifdef PYTHON
  python := $(PYTHON)
  torch := $(shell $(PYTHON) -c 'from importlib.metadata import version as v; print(v("torch"))' 2>/dev/null)
  bin := $(shell $(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("scripts"))')
  tools := tools
  export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
else
  python := .venv/bin/python
  torch := $(TORCH)
  bin := .venv/bin
  tools := .venv/test
  lint-tools := .venv/lint
  docs-tools := .venv/docs
  release-tools := .venv/release
endif

# The build is repeated for another interpreter, torch, or choice of CUDA kernels.
key := $(shell echo '$(abspath $(python)) $(torch) $(FUSEDOPT_CUDA) $(TORCH_CUDA_ARCH_LIST)' \
  | cksum | cut -d' ' -f1)
extension := build/extension-$(key)
emulator := build/emulator-$(key)
# Passive: a waiting thread doesn't spin, as the tests' processes share the cores.
pytest := OMP_WAIT_POLICY=passive $(python) -m pytest -n auto --maxprocesses 8 --dist worksteal

# ThreadSanitizer finds no room for its own memory if the system randomizes addresses widely.
unrandomized = $(shell setarch -R true 2>/dev/null && echo setarch -R)
# history_size=0: the shortest history for each of the many threads.
# ignore_noninstrumented_modules: torch is not compiled for ThreadSanitizer.
tsan-options := halt_on_error=1 history_size=0 ignore_noninstrumented_modules=1

cpp := $(filter-out csrc/__pycache__/%,$(wildcard csrc/*.* csrc/*/*.*))
emulation := $(wildcard tests/emulator/*.*)
measuring := benchmarks/ceiling.cpp benchmarks/ceiling.cu tests/front_end.cpp $(wildcard tests/guard/*.c)

.PHONY: help demo test test-tensorflow lint format sanitize racecheck bench bench-report peers docs wheel clean tools

help:
	@sed -n 's/^## \{0,1\}//p' Makefile

demo: $(extension)
	$(python) examples/train_digits.py

test: $(extension) $(emulator)
	$(pytest)

# The tests' own configuration needs plugins and a conftest.py that need torch. The package is built
# as pip builds it, with the kernels that are already compiled; a folder of its own keeps torch out.
# pip compiles none of TensorFlow's many files: Python does so with the few that it imports.
test-tensorflow: export KERAS_BACKEND := tensorflow
test-tensorflow: export PYTHONDONTWRITEBYTECODE :=
test-tensorflow: export PYTHONPATH := $(CURDIR)/build/tensorflow
test-tensorflow: .venv-tensorflow/test
	rm -rf build/tensorflow
	.venv-tensorflow/bin/python setup.py -q build --build-lib build/tensorflow
	OMP_WAIT_POLICY=passive .venv-tensorflow/bin/pytest -q -n auto --maxprocesses 8 --dist worksteal \
	  --noconftest -o filterwarnings=error \
	  tests/test_tensorflow*.py tests/test_keras*.py

lint: $(tools) $(lint-tools)
	$(bin)/ruff check
	$(bin)/ruff format --check
	$(bin)/clang-format --dry-run -Werror $(filter-out %.py,$(cpp)) $(filter-out %.py,$(emulation)) $(measuring)
	$(bin)/pyright --project . --pythonpath $(python)
	$(bin)/lint-imports

format: $(lint-tools)
	$(bin)/ruff check --fix
	$(bin)/ruff format
	$(bin)/clang-format -i $(filter-out %.py,$(cpp)) $(filter-out %.py,$(emulation)) $(measuring)

# pytest would hide the messages of a sanitizer that ends a test's process: they go to a file.
sanitize: $(tools)
	rm -f build/emulator/_C_sanitized.* build/sanitize.*
	$(python) tests/emulator/build.py sanitized
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0:log_path=$(CURDIR)/build/sanitize \
	UBSAN_OPTIONS=print_stacktrace=1:log_path=$(CURDIR)/build/sanitize \
	FUSEDOPT_TEST_SANITIZED=sanitized \
	$(pytest) -k emulated || { cat build/sanitize.* 2>/dev/null; exit 1; }

racecheck: $(tools)
	rm -f build/emulator/_C_racecheck.* build/racecheck.*
	$(python) tests/emulator/build.py racecheck
	$(unrandomized) env LD_PRELOAD="$$($(CXX) -print-file-name=libtsan.so)" OMP_NUM_THREADS=1 \
	TSAN_OPTIONS="$(tsan-options) log_path=$(CURDIR)/build/racecheck" \
	FUSEDOPT_TEST_SANITIZED=racecheck \
	$(pytest) -m racecheck -k emulated || { cat build/racecheck.* 2>/dev/null; exit 1; }

# Quiet: pytest-benchmark's own tables would repeat the output. BENCH=--save keeps the samples.
bench: $(extension)
	$(python) -m pytest benchmarks --benchmark-only --benchmark-quiet -rs $(BENCH)

bench-report: $(extension)
	$(python) -m benchmarks.report

peers: $(tools)
	FUSEDOPT_PURE_PYTHON=1 $(python) -m pip install --no-build-isolation --editable '.[peers]' \
	  'torch==$(shell $(python) -c 'from importlib.metadata import version as v; print(v("torch"))')'

docs: $(tools) $(docs-tools)
	NO_MKDOCS_2_WARNING=1 PATH="$(abspath $(bin)):$$PATH" $(python) -m mkdocs build --strict --quiet
	@echo "build/site/index.html"

wheel: $(tools) $(release-tools)
	$(python) tests/release/make_wheel.py --torch $(TORCHES)

clean:
	rm -rf .venv .venv-tensorflow build dist fusedopt/*.so fusedopt/_build.json *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

# Install torch first and alone, then the rest against this torch. The extension is built later, in
# place.
.venv/test: pyproject.toml
	python3 -m venv .venv
	.venv/bin/pip install $(TORCH)
	.venv/bin/pip install 'setuptools>=77'
	FUSEDOPT_PURE_PYTHON=1 .venv/bin/pip install --no-build-isolation --editable '.[test]'
	touch $@

.venv-tensorflow/test: pyproject.toml
	python3 -m venv .venv-tensorflow
	.venv-tensorflow/bin/pip install --no-compile 'tensorflow-cpu>=2.21' 'keras>=3.15' scikit-learn \
	  pytest pytest-xdist 'setuptools>=77'
	touch $@

.venv/lint: .venv/test
	FUSEDOPT_PURE_PYTHON=1 .venv/bin/pip install --no-build-isolation --editable '.[lint]'
	touch $@

.venv/docs: .venv/test
	FUSEDOPT_PURE_PYTHON=1 .venv/bin/pip install --no-build-isolation --editable '.[docs]'
	touch $@

.venv/release: .venv/test
	FUSEDOPT_PURE_PYTHON=1 .venv/bin/pip install --no-build-isolation --editable '.[release]'
	touch $@

tools:
	@$(python) -c "import importlib.util, sys; \
	needed = 'torch setuptools ninja pytest xdist pytest_benchmark hypothesis numpy sklearn matplotlib rich tqdm'.split(); \
	missing = [name for name in needed if importlib.util.find_spec(name) is None]; \
	missing and sys.exit(f'$(PYTHON) lacks {missing}: see the extra \'test\' in pyproject.toml')"

$(extension): $(cpp) setup.py pyproject.toml | $(tools)
	rm -f build/extension-*
	rm -f build/with-cuda
	$(python) setup.py build_ext --inplace --force
	$(if $(filter 1,$(FUSEDOPT_CUDA)),touch build/with-cuda)
	touch $@

$(emulator): $(cpp) $(emulation) | $(tools)
	rm -f build/emulator-* build/emulator/_C_emulated.*
	$(python) tests/emulator/build.py
	touch $@
