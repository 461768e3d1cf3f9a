# make demo   installs what is missing, builds, makes the image, serves, sends a real request
# make test   everything that CI runs
# make help   the rest

GUEST_TARGET := x86_64-unknown-linux-gnu
DATA         := $(CURDIR)/target/thaw-data
THAW         := $(CURDIR)/target/release/thaw

# Byte code beside the runner's sources would look like a change of what thaw embeds.
export PYTHONDONTWRITEBYTECODE := 1

.PHONY: help setup build guest image demo test lint unit blackbox nested nested-smoke bench bench-client stress clean

help:
	@echo "make demo      install what is missing, build, make the image, serve, send one real request"
	@echo "make test      everything that CI runs: format, lints, unit tests, tests against real VMs"
	@echo "make build     target/release/thaw and the guest's programs"
	@echo "make image     the minimal image, in target/thaw-data"
	@echo "make nested    the black-box tests on an emulated host with SVM (hours); nested-smoke: the gist (minutes)"
	@echo "make bench     the README's figures, measured here"
	@echo "make bench-client  the same for the official client: calls and files"
	@echo "make stress    a thousand random kills, and 500 sessions asleep at once (10 minutes)"
	@echo "make clean     remove everything that was built"

setup:
	@scripts/setup

# The guest's programs are static: the agent starts before there is a root file system.
guest: setup
	RUSTFLAGS="-C target-feature=+crt-static" cargo build --quiet --profile guest --target $(GUEST_TARGET) -p thaw-agent -p thaw-selftest

build: guest
	cargo build --release -p thaw

image: build
	$(THAW) image build minimal --data-dir $(DATA)

demo: image
	@scripts/demo $(THAW) $(DATA)

lint: setup
	cargo fmt --all --check
	cargo clippy --quiet --workspace --all-targets -- -D warnings

unit: image
	THAW_TEST_DATA=$(DATA) THAW_SELFTEST=$(CURDIR)/target/$(GUEST_TARGET)/guest/thaw-selftest \
		cargo test --release --workspace

blackbox: image
	scripts/blackbox $(THAW) $(DATA)

# The machine of ordinary KVM hosts, under an emulator: see scripts/nested. One emulated processor: QEMU 7.2 hangs now and
# then when one of several turns virtualization on or off.
# Once more if the emulator itself hangs or ends (124, 125).
nested-smoke: image
	scripts/blackbox $(THAW) $(DATA) --collect-only -qq >/dev/null
	unit="$$(scripts/unit-program thaw_vmm)"; for try in 1 2; do \
		scripts/nested --seconds 600 --cpus 1 -- scripts/nested-smoke $(THAW) $(DATA) "$$unit"; code=$$?; \
		[ $$code -eq 124 ] || [ $$code -eq 125 ] || break; \
	done; exit $$code

nested: image
	scripts/blackbox $(THAW) $(DATA) --collect-only -qq >/dev/null
	mkdir -p $(CURDIR)/target/nested-out
	scripts/nested --seconds 28800 --cpus 1 --memory 10240 --out $(CURDIR)/target/nested-out -- \
		scripts/nested-suite $(THAW) $(DATA) $(CURDIR)/target/nested-out

test:
	@scripts/test

bench: image
	$(THAW) bench warm --data-dir $(DATA)
	$(THAW) bench cold --data-dir $(DATA)
	$(THAW) bench restore --data-dir $(DATA)

stress: image
	THAW_KILLS=1000 THAW_SLEEPERS=500 scripts/blackbox $(THAW) $(DATA) -k "test_kills or many_hibernated" -s

bench-client: image
	scripts/blackbox $(THAW) $(DATA) --collect-only -qq >/dev/null
	target/venv/bin/python scripts/client-figures $(THAW) $(DATA)

clean:
	cargo clean
