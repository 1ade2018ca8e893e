// Package nbd serves block storage over the NBD protocol: fixed newstyle
// handshake, simple and structured replies, base:allocation, over TCP and unix
// sockets. The specification is doc/proto.md of github.com/NetworkBlockDevice/nbd.
//
// A [Server] asks an [Exports] which exports there are, opens one when a client
// enters it, and closes it when that connection is over. What an export stores
// is a [Backend], widened by optional interfaces that each switch on one
// feature of the protocol. Package nbd/device makes a Backend of Firn's own
// devices, nbd/backend of memory and files; nbd/server is the way in for one
// connection.
//
// Memory is bounded whatever clients send: see [Options].
package nbd

import (
	"context"
	"io"

	"firn.io/firn/nbd/wire"
)

// Backend is what an export must be able to do. All methods may be called by
// many goroutines at once. ReadAt and WriteAt follow package io; neither keeps
// its buffer. Sync returns when every write that was answered before is
// durable.
//
// An error that is or wraps a [wire.Errno] or a syscall.Errno is told to the
// client as that, an error kind of Firn as package nbd's table says, and any
// other as EIO.
type Backend interface {
	io.ReaderAt
	io.WriterAt
	// Size returns the size in bytes. It may change; requests are checked
	// against it as it grows, and the Backend itself refuses what a shrink cut.
	Size() (int64, error)
	Sync() error
}

// Flags modify a write, trim or write-zeroes.
type Flags uint8

const (
	// FUA asks for durability before the call returns.
	FUA Flags = 1 << iota
	// NoHole asks WriteZeroes to keep the space allocated.
	NoHole
	// FastZero asks WriteZeroes to fail with wire.ENOTSUP at once unless it is
	// faster than writing zeros.
	FastZero
)

// ContextBackend is a Backend whose calls end early when the connection that
// asked is gone. The server prefers it to ReadAt, WriteAt and Sync, and
// advertises FUA natively.
type ContextBackend interface {
	// ReadContext fills p with the bytes at off.
	ReadContext(ctx context.Context, p []byte, off int64) error
	// WriteContext writes p at off and does not keep p.
	WriteContext(ctx context.Context, p []byte, off int64, f Flags) error
	// FlushContext returns when every write answered before is durable.
	FlushContext(ctx context.Context) error
}

// Trimmer is a Backend that can let go of bytes. Without it NBD_CMD_TRIM is not
// offered.
type Trimmer interface {
	Trim(ctx context.Context, off, n int64, f Flags) error
}

// Zeroer is a Backend that can make bytes zero without being sent them. Without
// it the server writes zeros, and does not offer FastZero.
type Zeroer interface {
	WriteZeroes(ctx context.Context, off, n int64, f Flags) error
}

// Cacher is a Backend that can bring bytes closer. Without it NBD_CMD_CACHE is
// not offered.
type Cacher interface {
	Cache(ctx context.Context, off, n int64) error
}

// Extent is a run of bytes in one state.
type Extent struct {
	Bytes int64
	// Hole: not allocated.
	Hole bool
	// Zero: reads as zero.
	Zero bool
}

// Mapper is a Backend that knows which bytes are allocated. Without it the
// context base:allocation is not offered.
type Mapper interface {
	// Extents appends to dst the states of the bytes from off on until n bytes
	// are covered or max extents were appended, and at least one.
	Extents(ctx context.Context, dst []Extent, off, n int64, max int) ([]Extent, error)
}

// Loan is memory that a Lender lends until Release.
type Loan interface {
	// Bytes stays unchanged until Release.
	Bytes() []byte
	// Release gives the memory back; it is called exactly once.
	Release()
}

// Lender is a Backend that can answer some reads from memory at once. The
// server answers those in the goroutine that reads the connection.
type Lender interface {
	// Lend returns the n bytes at off if memory holds all of them current. It
	// never blocks on anything slower than a mutex.
	Lend(off int64, n int) (Loan, bool)
}

// Info is what a client is told of an export. The answers to NBD_OPT_INFO and
// NBD_OPT_GO are made of it.
type Info struct {
	// Name is the export's own name; it differs from the name that was asked
	// for if that was the default export ("").
	Name string
	// ID identifies the export whatever its name is, for Server.Disconnect; clients
	// are not told. It may be empty.
	ID string
	// Description is free text for people.
	Description string
	// Bytes is the size.
	Bytes int64
	// ReadOnly refuses every change with EPERM.
	ReadOnly bool
	// MultiConn promises that a flush on one connection covers what was
	// answered on all, and that all see each other's answered writes.
	MultiConn bool
	// MinBlock, PreferredBlock are advice in bytes, powers of two; 0 is 1 and
	// 4096. The server itself accepts any alignment.
	MinBlock, PreferredBlock int
	// MaxBlock is the length of requests that a client is told not to exceed, a
	// power of two; 0 is 32 MiB, which is also the most.
	MaxBlock int
	// MaxPiece bounds the bytes that one call of the Backend reads or writes,
	// at least 4096. Larger requests are split at multiples of the largest of
	// 4, 16, 64, 256 KiB and 1 MiB that is within it. 0 is no bound.
	MaxPiece int
	// Offers are the optional commands. OffersOf tells a Backend's.
	Offers Offers
}

// Offers is the set of optional commands that an export has.
type Offers uint8

const (
	OfferTrim Offers = 1 << iota
	OfferZeroes
	OfferFastZero
	OfferCache
	OfferMap
)

// OffersOf tells which optional commands the server can give for b.
func OffersOf(b Backend) Offers {
	offers := OfferZeroes
	if _, ok := b.(Trimmer); ok {
		offers |= OfferTrim
	}
	if _, ok := b.(Zeroer); ok {
		offers |= OfferFastZero
	}
	if _, ok := b.(Cacher); ok {
		offers |= OfferCache
	}
	if _, ok := b.(Mapper); ok {
		offers |= OfferMap
	}
	return offers
}

// Export is an export that one connection has entered.
type Export struct {
	// Info is as of now.
	Info    Info
	Backend Backend
	// Close is called once, after the last request of the connection that
	// entered the export has ended and before its socket is closed. It may be
	// nil.
	Close func()
}

// Exports says which exports there are. All methods may be called by many
// goroutines at once. ctx ends with the handshake's time (List, Info), with
// [Options.OpenTimeout] (Open), or when the server closes.
//
// An error that is fs.ErrNotExist or of Firn's kind "not found" tells the
// client that there is no such export; others that it is refused. The error's
// text travels to the client.
type Exports interface {
	// List returns the names that NBD_OPT_LIST shows, with their descriptions.
	// The other fields of Info may be empty.
	List(ctx context.Context) ([]Info, error)
	// Info tells what Open would give, without entering the export. The name ""
	// asks for the default export.
	Info(ctx context.Context, name string) (Info, error)
	// Open enters the export: Firn attaches the volume.
	Open(ctx context.Context, name string) (*Export, error)
}

// Errno is an error number as the protocol knows it. A Backend may return one.
type Errno = wire.Errno

// The error numbers of the protocol.
const (
	EPERM     = wire.EPERM
	EIO       = wire.EIO
	ENOMEM    = wire.ENOMEM
	EINVAL    = wire.EINVAL
	ENOSPC    = wire.ENOSPC
	EOVERFLOW = wire.EOVERFLOW
	ENOTSUP   = wire.ENOTSUP
	ESHUTDOWN = wire.ESHUTDOWN
)
