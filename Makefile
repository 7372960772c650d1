# Everything runs against the committed Cargo.lock.
CARGO ?= cargo

.DEFAULT_GOAL := help
.PHONY: help setup demo test bench fmt clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## Install what building and testing need: protoc, etcd, a linker, rustfmt, clippy
	@scripts/setup

# The dev profile: it shares its artifacts with `make test`, and an optimized build of all
# dependencies would take longer than the demo itself.
demo: setup ## Run a load-balanced cluster on this machine
	$(CARGO) run --locked --all-features --example greeter_cluster

# `cargo test` covers the library, the examples, the integration tests and the doc tests, but not
# the benches. The bare library is checked by itself because the tests turn features on.
test: setup ## Check formatting, lints and docs, and run all tests
	@echo "with $$("$${ETCD_BIN:-etcd}" --version | sed -n 1p), $$("$${PROTOC:-protoc}" --version)"
	@command -v go >/dev/null && go version || echo "left out: the tests with grpc-go (there is no Go)"
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --all-targets --all-features -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked --no-deps --all-features
	$(CARGO) test --locked --all-features
	$(CARGO) clippy --locked --lib --no-default-features -- -D warnings

bench: setup ## Run the benchmarks
	$(CARGO) bench --locked

fmt: ## Format the code
	$(CARGO) fmt --all

clean: ## Remove everything that was built
	$(CARGO) clean
