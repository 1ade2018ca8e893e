// Package server serves one NBD connection with one call, for programs that
// have their own listener. Its names are those that users of
// github.com/pojntfx/go-nbd know; package nbd has the Server behind it.
package server

import (
	"context"
	"errors"
	"fmt"
	"net"

	"firn.io/firn/nbd"
)

// Export is a Backend under a name. The same Backend may be served on many
// connections.
type Export struct {
	Name        string
	Description string
	Backend     nbd.Backend
}

// Options of [Handle]. They are not changed.
type Options struct {
	// ReadOnly refuses every change.
	ReadOnly bool
	// MinimumBlockSize, PreferredBlockSize, MaximumBlockSize are what clients are
	// told, powers of two, at most 64 KiB, 64 KiB and 32 MiB; 0 is 1, 4096 and
	// 32 MiB.
	MinimumBlockSize, PreferredBlockSize, MaximumBlockSize uint32
	// MaximumRequestSize bounds the bytes of one call of the Backend, at least
	// 4096. 0 is 1 MiB.
	MaximumRequestSize int
	// SupportsMultiConn promises that Sync covers the writes of all connections.
	SupportsMultiConn bool
	// Parallel is how many calls of the Backend may run at once for the
	// connection. 0 is 1.
	Parallel int
}

// Handle serves the first of exports that the client names, or the first if it
// names none, until the client leaves, and closes conn. It returns nil if the
// client left as the protocol wants it. Without options several connections are
// offered (SupportsMultiConn).
func Handle(conn net.Conn, exports []*Export, options *Options) error {
	return HandleContext(context.Background(), conn, exports, options)
}

// HandleContext is Handle until ctx ends: then it closes the connection, and
// returns ctx's error once the calls in flight have returned.
func HandleContext(ctx context.Context, conn net.Conn, exports []*Export, options *Options) error {
	o := Options{SupportsMultiConn: true}
	if options != nil {
		o = *options
	}
	var fixed nbd.Fixed
	for i, e := range exports {
		if e == nil || e.Backend == nil {
			conn.Close()
			return fmt.Errorf("nbd: export %d of %d has no backend", i, len(exports))
		}
		fixed = append(fixed, nbd.Export{Backend: e.Backend, Info: nbd.Info{
			Name: e.Name, Description: e.Description, ReadOnly: o.ReadOnly, MultiConn: o.SupportsMultiConn,
			MinBlock: int(o.MinimumBlockSize), PreferredBlock: int(o.PreferredBlockSize), MaxBlock: int(o.MaximumBlockSize),
			MaxPiece: o.MaximumRequestSize, Offers: nbd.OffersOf(e.Backend),
		}})
	}
	s := nbd.NewServer(fixed, nbd.Options{Workers: max(o.Parallel, 1)})
	closed := make(chan error, 1)
	stop := context.AfterFunc(ctx, func() { closed <- s.Close() })
	err := s.ServeConn(conn)
	if !stop() {
		return errors.Join(ctx.Err(), <-closed)
	}
	return err
}
