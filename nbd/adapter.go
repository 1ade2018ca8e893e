package nbd

import (
	"context"
	"errors"
	"io/fs"
	"syscall"

	"firn.io/firn/internal/block"
	"firn.io/firn/nbd/wire"
)

// FromDevice makes a Backend of a block.Device. It has all optional interfaces;
// it lends only if the device is a block.MemoryReader.
func FromDevice(d block.Device) Backend {
	a := &deviceBackend{d: d}
	a.memory, _ = d.(block.MemoryReader)
	a.prefetch, _ = d.(block.Prefetcher)
	return a
}

// DeviceInfo describes a device of geometry g, attached or not.
func DeviceInfo(g block.Geometry) Info {
	return Info{
		Name:           g.Name,
		Description:    "Firn volume " + g.ID.String(),
		Bytes:          g.SizeBytes,
		ReadOnly:       g.ReadOnly,
		MultiConn:      true,
		PreferredBlock: g.PreferredBytes,
		MaxPiece:       g.MaxBytes,
		Offers:         OfferTrim | OfferZeroes | OfferFastZero | OfferCache | OfferMap,
	}
}

// DeviceExport is an entered export of d. Close is called when the connection
// that entered it has left.
func DeviceExport(d block.Device, close func()) *Export {
	return &Export{Info: DeviceInfo(d.Geometry()), Backend: FromDevice(d), Close: close}
}

type deviceBackend struct {
	d        block.Device
	memory   block.MemoryReader
	prefetch block.Prefetcher
}

func (a *deviceBackend) ReadAt(p []byte, off int64) (int, error) {
	if err := a.d.ReadAt(context.Background(), p, off); err != nil {
		return 0, err
	}
	return len(p), nil
}

func (a *deviceBackend) WriteAt(p []byte, off int64) (int, error) {
	if err := a.d.WriteAt(context.Background(), p, off, 0); err != nil {
		return 0, err
	}
	return len(p), nil
}

func (a *deviceBackend) Size() (int64, error) { return a.d.Geometry().SizeBytes, nil }

func (a *deviceBackend) Sync() error { return a.d.Flush(context.Background()) }

func (a *deviceBackend) ReadContext(ctx context.Context, p []byte, off int64) error {
	return a.d.ReadAt(ctx, p, off)
}

func (a *deviceBackend) WriteContext(ctx context.Context, p []byte, off int64, f Flags) error {
	return a.d.WriteAt(ctx, p, off, deviceFlags(f))
}

func (a *deviceBackend) FlushContext(ctx context.Context) error { return a.d.Flush(ctx) }

func (a *deviceBackend) Trim(ctx context.Context, off, n int64, f Flags) error {
	return a.d.Trim(ctx, off, n, deviceFlags(f))
}

func (a *deviceBackend) WriteZeroes(ctx context.Context, off, n int64, f Flags) error {
	return a.d.WriteZeroes(ctx, off, n, deviceFlags(f))
}

// Cache is advice: a device that cannot prefetch has done all it can.
func (a *deviceBackend) Cache(ctx context.Context, off, n int64) error {
	if a.prefetch == nil {
		return nil
	}
	return a.prefetch.Prefetch(ctx, off, n)
}

func (a *deviceBackend) Extents(ctx context.Context, dst []Extent, off, n int64, max int) ([]Extent, error) {
	extents, err := a.d.Extents(ctx, nil, off, n, max)
	for _, e := range extents {
		dst = append(dst, Extent{Bytes: e.Bytes, Hole: e.State == block.Hole, Zero: e.State != block.Data})
	}
	return dst, err
}

func (a *deviceBackend) Lend(off int64, n int) (Loan, bool) {
	if a.memory == nil {
		return nil, false
	}
	return a.memory.ReadMemory(off, n)
}

func deviceFlags(f Flags) (g block.Flags) {
	if f&FUA != 0 {
		g |= block.FUA
	}
	if f&NoHole != 0 {
		g |= block.NoHole
	}
	if f&FastZero != 0 {
		g |= block.FastZero
	}
	return g
}

// translate is how Firn's error kinds are told to an NBD client: as the error
// number of a request, and as the refusal of INFO and GO. Fenced and Canceled
// say ESHUTDOWN: this connection is over, another may work.
func translate(k block.Kind) (wire.Errno, wire.OptReply) {
	switch k {
	case block.NotFound:
		return wire.EIO, wire.RepErrUnknown
	case block.Exists, block.Busy:
		return wire.EIO, wire.RepErrPolicy
	case block.Invalid, block.OutOfRange:
		return wire.EINVAL, wire.RepErrInvalid
	case block.ReadOnly, block.Denied:
		return wire.EPERM, wire.RepErrPolicy
	case block.NoSpace:
		return wire.ENOSPC, wire.RepErrPlatform
	case block.Fenced:
		return wire.ESHUTDOWN, wire.RepErrPolicy
	case block.Canceled:
		return wire.ESHUTDOWN, wire.RepErrShutdown
	case block.Unsupported:
		return wire.ENOTSUP, wire.RepErrUnsup
	}
	// Internal, Unavailable, Corrupt, and kinds that this table does not know.
	return wire.EIO, wire.RepErrPlatform
}

// errnoOf translates a Backend's error for a request of command c. The spec
// wants ENOSPC for writes past the end and EINVAL for other requests past it,
// and allows ENOTSUP only for fast zeroes.
func errnoOf(err error, c wire.Command, f wire.CommandFlags) wire.Errno {
	e := rawErrno(err)
	switch writes := c == wire.CmdWrite || c == wire.CmdWriteZeroes; {
	case writes && errors.Is(err, block.OutOfRange):
		return wire.ENOSPC
	case e == wire.ENOTSUP && f&wire.FlagFastZero == 0:
		return wire.EINVAL
	case e == wire.EOVERFLOW:
		return wire.EINVAL
	}
	return e
}

func rawErrno(err error) wire.Errno {
	var e wire.Errno
	if errors.As(err, &e) {
		for _, known := range wire.Errnos {
			if e == known {
				return e
			}
		}
		return wire.EIO
	}
	if k := block.KindOf(err); k != block.Internal {
		e, _ = translate(k)
		return e
	}
	if errors.Is(err, context.Canceled) {
		return wire.ESHUTDOWN
	}
	var sys syscall.Errno
	errors.As(err, &sys)
	switch sys {
	case syscall.EPERM, syscall.EACCES, syscall.EROFS:
		return wire.EPERM
	case syscall.ENOMEM:
		return wire.ENOMEM
	case syscall.EINVAL:
		return wire.EINVAL
	case syscall.ENOSPC, syscall.EDQUOT, syscall.EFBIG:
		return wire.ENOSPC
	case syscall.EOPNOTSUPP:
		return wire.ENOTSUP
	case syscall.ESHUTDOWN:
		return wire.ESHUTDOWN
	}
	return wire.EIO
}

// refusalOf translates an error of Exports.
func refusalOf(err error) wire.OptReply {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return wire.RepErrUnknown
	case errors.Is(err, ErrTLSRequired):
		return wire.RepErrTLSRequired
	case errors.Is(err, fs.ErrPermission):
		return wire.RepErrPolicy
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		return wire.RepErrShutdown
	}
	_, refusal := translate(block.KindOf(err))
	return refusal
}
