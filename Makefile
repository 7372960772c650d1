# Everything runs against the committed Cargo.lock.
CARGO ?= cargo
# The newest etcd that is tested with, besides the one that is installed.
ETCD_NEWEST ?= 3.7.3
# What a version of etcd makes the most difference to. `make test-newest ETCD_TESTS=` runs everything with it.
ETCD_TESTS ?= --test auth --test faults --test registration
# Tests at once of those that wait most of their time, for a lease to run out or a member to come back. Others measure latencies, and are not
# among them.
TEST_THREADS ?= 4
WAITING := auth faults health_check mass_removal network registration resolver
# All others, except those that need what `make interop` installs, and the list of the public interface, which `make lint` compares.
FILES := $(patsubst tests/%.rs,%,$(wildcard tests/*.rs)) $(patsubst tests/%/main.rs,%,$(wildcard tests/*/main.rs))
REST := $(filter-out $(WAITING) api operate peers,$(FILES))
# As in Cargo.toml.
MSRV := 1.88.0
# Each set of features is built and documented by itself.
FEATURE_SETS := none tls health orca serde dns-srv testing tls,health tls,testing health,testing

.DEFAULT_GOAL := help
.PHONY: help setup demo lint features api minimal-versions msrv test test-newest interop operate soak bench bench-peers bench-policies instructions fleet pictures fmt clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## Install what building and testing need: protoc, etcd, a linker, rustfmt, clippy
	@scripts/setup

# The dev profile: it shares its artifacts with `make test`, and an optimized build of all
# dependencies would take longer than the demo itself.
demo: setup ## Run a load-balanced cluster on this machine
	$(CARGO) run --locked --all-features --example greeter_cluster

# The bare libraries are checked by themselves because the tests enable features.
lint: setup features api ## Check formatting, lints, docs, each set of features, dependencies and the public interface
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --workspace --all-targets --all-features -- -D warnings
	$(CARGO) clippy --locked --test peers --test operate --all-features -- -D warnings
	$(CARGO) clippy --locked --bench fleet --all-features -- -D warnings
	$(CARGO) clippy --locked --bench peers --bench policies --all-features -- -D warnings
	$(CARGO) clippy --locked --workspace --lib --no-default-features -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked --workspace --no-deps --all-features
	$(CARGO) rustc --locked --lib -p tonic-balance --all-features -- -D unused-crate-dependencies
	$(CARGO) rustc --locked --lib -p tonic-etcd --all-features -- -D unused-crate-dependencies
	$(CARGO) rustc --locked --lib -p tonic-balance-channelz -- -D unused-crate-dependencies
	$(CARGO) rustc --locked --lib -p tonic-etcd-opentelemetry -- -D unused-crate-dependencies

features: setup ## Check each feature alone, and in pairs, with its docs
	@set -e; for features in $(subst none,,$(FEATURE_SETS)) ""; do \
		echo "features: $${features:-none}"; \
		$(CARGO) clippy --locked --quiet --lib -p tonic-etcd --no-default-features --features "$$features" -- -D warnings; \
		RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked --quiet --no-deps -p tonic-etcd --no-default-features --features "$$features"; \
	done
	$(CARGO) clippy --locked --quiet --lib -p tonic-balance --no-default-features -- -D warnings
	$(CARGO) clippy --locked --quiet --lib -p tonic-balance --no-default-features --features service-config -- -D warnings
	$(CARGO) clippy --locked --quiet --lib -p tonic-balance --no-default-features --features orca -- -D warnings
	$(CARGO) clippy --locked --quiet --lib -p tonic-balance --no-default-features --features dns-srv -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked --quiet --no-deps -p tonic-balance --no-default-features

api: setup ## Compare the public interface with the list in docs/api; API_UPDATE=1 writes the list
	$(CARGO) test --locked --all-features --test api

msrv: setup ## Build with the oldest Rust that is supported, which rustup installs
	@if ! rustup toolchain install $(MSRV) --profile minimal; then \
		echo "LEFT OUT: the build with Rust $(MSRV), because rustup is missing or cannot install it"; \
	else \
		$(CARGO) +$(MSRV) check --locked --workspace --lib --all-features --target-dir target/msrv; \
	fi

# With the oldest versions of the direct dependencies that Cargo.toml allows. In a copy, for the lock file is replaced.
minimal-versions: setup ## Check that the oldest dependencies allowed still suffice
	scripts/minimal-versions

# Together these cover the libraries, the command (`--bins` and `--test command`), the examples, the integration tests and the doc tests, but not
# the benches.
test: setup ## Run all tests
	@echo "with $$("$${ETCD_BIN:-etcd}" --version | sed -n 1p), $$("$${PROTOC:-protoc}" --version)"
	@command -v go >/dev/null && go version || echo "left out: the tests with grpc-go (there is no Go)"
	$(CARGO) test --locked --workspace --all-features --no-run
	$(CARGO) test --locked --workspace --all-features --lib --bins --examples $(REST:%=--test %) --test command --test sdk --test propagation
	RUST_TEST_THREADS=$(TEST_THREADS) $(CARGO) test --locked --all-features $(WAITING:%=--test %)
	$(CARGO) test --locked --workspace --all-features --doc

test-newest: ## Run the tests that depend on etcd with the newest one, which Go builds
	@etcd=$$(scripts/build-etcd $(ETCD_NEWEST)) && "$$etcd" --version | sed -n 1p && \
		ETCD_BIN=$$etcd RUST_TEST_THREADS=$(TEST_THREADS) $(CARGO) test --locked --all-features $(ETCD_TESTS) && \
		ETCD_BIN=$$etcd $(CARGO) test --locked --all-features --test resolver quiet

# Installs and builds them once, which takes minutes. Two tests at once: most of them wait for the other side.
interop: setup ## Run the tests with real servers and proxies (grpc-go, grpc-java, grpcio, grpc-js, nginx, haproxy, Caddy, dnsmasq)
	scripts/setup-interop
	$(CARGO) build --locked -p tonic-etcd-cli
	RUST_TEST_THREADS=2 $(CARGO) test --locked --all-features --test peers

operate: setup ## Run the examples with a real Prometheus, the queries of the dashboard, the alerts, and the tests of the command
	@scripts/setup-operate
	$(CARGO) build --locked --all-features --examples
	$(CARGO) test --locked --all-features --test operate
	$(CARGO) test --locked -p tonic-etcd-cli --test command

# One after the other: they measure time, and some of them load the whole machine. About an hour. The scripted etcd plays its
# histories optimized, hundreds in a second. With the newest etcd where Go is.
soak: setup ## Run all tests with the times, sizes and numbers of seeds that `make test` spares
	SOAK=1 $(CARGO) test --locked --workspace --all-features -- --nocapture --test-threads=1
	TEST_SEEDS=5000 $(CARGO) test --locked --all-features --profile bench --lib the_final_set_is_exact
	@if command -v go >/dev/null 2>&1; then \
		SOAK=1 $(MAKE) --no-print-directory test-newest TEST_THREADS=1; \
	else \
		echo "LEFT OUT: the soak with etcd $(ETCD_NEWEST), because Go is missing, which would build it"; \
	fi

bench: setup ## Run the benchmarks
	$(CARGO) bench --locked

# Under valgrind, and compared with benches/instructions/baseline.json.
instructions: setup ## Compare the instructions of a call with the baseline; INSTRUCTIONS_UPDATE=1 writes the baseline
	$(CARGO) bench --locked --bench instructions

# PEERS selects scenarios: make bench-peers PEERS="unary-16 slow kill join".
bench-peers: setup ## Compare the channel with grpc-go and tonic-xds, if Go is installed
	@folder=$$(CARGO="$(CARGO)" scripts/setup-bench-peers) && if [ -n "$$folder" ]; then \
		BENCH_PEERS=$$folder $(CARGO) bench --locked --bench peers -- $(PEERS); \
	fi

# The same cases on processes and in virtual time, the differences of the two, and the tables and pictures of docs/policies.md. POLICIES
# selects cases on processes: make bench-policies POLICIES="Slow,4 Flapping". POLICIES_SECONDS=3 makes all times shorter, to try it out.
bench-policies: setup ## Compare the load-balancing policies, on processes and in a simulation, which needs Python 3
	@mkdir -p target
	TEST_POLICIES=1 $(CARGO) test --profile bench --locked -p tonic-balance --lib -- --nocapture --exact balance::tests::policies::the_policies_in_virtual_time > target/policies-simulated.txt
	folder=$$(CARGO="$(CARGO)" scripts/setup-bench-peers go) && \
		BENCH_PEERS=$$folder $(CARGO) bench --locked --bench policies -- $(POLICIES) > target/policies-processes.txt
	benches/plot target/policies-simulated.txt target/policies-processes.txt

# FLEET has the scenarios and the options: make fleet FLEET="rest restart --number 300". etcd is the one of ETCD_BIN.
fleet: setup ## Measure what a fleet of clients and servers costs etcd
	@"$${ETCD_BIN:-etcd}" --version | sed -n 1p
	$(CARGO) bench --locked --bench fleet -- $(FLEET)
	@echo "a fleet of 10 000 clients in virtual time"
	TEST_FLEET=10000,40 $(CARGO) test --release --locked --all-features --lib -- --nocapture a_fleet_in_virtual_time

pictures: setup ## Measure and draw the pictures of docs/performance.md, which needs Python 3
	@mkdir -p target
	$(CARGO) test --locked -p tonic-balance --lib -- --nocapture a_slow_server_is_avoided_by_channels_with_few_calls > target/shares.txt
	$(CARGO) bench --locked --bench load -- L1e L2 > target/load.txt
	benches/plot target/shares.txt target/load.txt

fmt: ## Format the code
	$(CARGO) fmt --all

clean: ## Remove everything that was built
	$(CARGO) clean
