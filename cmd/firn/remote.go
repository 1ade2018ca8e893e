package main

import (
	"context"
	"net"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"

	"firn.io/firn/cluster/clusterpb"
	"firn.io/firn/internal/block"
)

const defaultAPI = "127.0.0.1:7400"

// remote is the connection of a command to the admin API.
type remote struct {
	*console
	addr    string
	timeout time.Duration
	tls     tlsFlags
}

// flags adds what every command that calls the API takes.
func (r *remote) flags(cmd *cobra.Command) {
	cmd.PersistentFlags().StringVar(&r.addr, "api", defaultAPI, "address of the admin API of a gateway or of firn up")
	cmd.PersistentFlags().DurationVar(&r.timeout, "timeout", time.Minute, "give up after this long")
	r.tls.register(cmd)
}

// call connects, runs fn, and shows on a terminal that it takes its time. The
// error of fn comes back with its kind.
func (r *remote) call(ctx context.Context, what string, fn func(context.Context, clusterpb.AdminClient) error) error {
	creds, err := r.tls.client(r.addr)
	if err != nil {
		return err
	}
	conn, err := grpc.NewClient(r.addr, grpc.WithTransportCredentials(creds))
	if err != nil {
		return block.Wrap(block.Invalid, err, "API address %q", r.addr)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, r.timeout)
	defer cancel()
	return r.waiting(ctx, what, func(ctx context.Context) error {
		return fromStatus(fn(ctx, clusterpb.NewAdminClient(conn)), r.addr)
	})
}

// isLoopback tells whether a listen or dial address stays on this machine.
func isLoopback(addr string) bool {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return false
	}
	if host == "localhost" {
		return true
	}
	ip := net.ParseIP(host)
	return ip != nil && ip.IsLoopback()
}

// plaintext is used on loopback and where --insecure asks for it.
func plaintext() credentials.TransportCredentials { return insecure.NewCredentials() }
