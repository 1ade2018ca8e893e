// Package clusterpb is the generated code of the admin API (admin.proto), by
// which the command line talks to a gateway. `make proto` makes it anew.
package clusterpb

//go:generate protoc --go_out=. --go_opt=paths=source_relative --go-grpc_out=. --go-grpc_opt=paths=source_relative admin.proto
