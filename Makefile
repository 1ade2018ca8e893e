# Firn. `make` or `make help` lists what there is.

export PATH := $(PATH):$(shell go env GOPATH)/bin
REVISION = $(shell git rev-parse --short=12 HEAD 2>/dev/null)
.DEFAULT_GOAL := help
.PHONY: help build check test test-long sim fuzz mutants bench images proto fmt

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

build: ## Build ./firn
	go build -ldflags "-X main.revision=$(REVISION)" -o firn ./cmd/firn

check: ## Format, vet, unit tests and a few seeds, at most 5 minutes: what to run before a commit
	go run ./test/run -only format,vet,unit,sim -seeds 3

test: ## Everything, with real clients and processes: what CI runs
	go run ./test/run

test-long: ## Everything in its long variants, at most 75 minutes
	go run ./test/run -long

sim: ## The whole-cluster simulation; `make sim SEED=n` replays one seed
	if [ -n "$(SEED)" ]; then go test ./test/sim -run "TestSeed$$" -seed $(SEED) -v; else go run ./test/run -only sim; fi

mutants: ## Break promises of the storage on purpose, one at a time: the tests must find each
	go run ./test/mutants

fuzz: ## Every fuzz target, a million inputs each
	go run ./test/run -only fuzz -fuzzruns 1000000

bench: ## Measure side by side with nbdkit and qemu-nbd; see docs/benchmarks.md
	go run ./bench

images: ## Build the images of docker-compose.yml; needs no registry
	mkdir -p dist/empty
	CGO_ENABLED=0 go build -ldflags "-s -w -X main.revision=$(REVISION)" -o dist/firn ./cmd/firn
	CGO_ENABLED=0 go build -ldflags "-s -w" -o dist/etcd ./deploy/etcd
	DOCKER_BUILDKIT=0 docker-compose build

proto: ## Generate the admin API's code
	go install google.golang.org/protobuf/cmd/protoc-gen-go@v1.36.12
	go install google.golang.org/grpc/cmd/protoc-gen-go-grpc@v1.6.2
	go generate ./cluster/clusterpb

fmt: ## Format the source
	gofmt -w $$(git ls-files '*.go' | grep -v '\.pb\.go$$')
