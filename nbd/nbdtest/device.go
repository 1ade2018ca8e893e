// Package nbdtest shows an export of an NBD server as a block.Device, so that
// the conformance suite can run through the protocol.
package nbdtest

import (
	"context"
	"errors"
	"math"

	"firn.io/firn/internal/block"
	"firn.io/firn/nbd/client"
	"firn.io/firn/nbd/wire"
)

// Device is a block.Device over connections to one export; request i of it uses
// connection i modulo their number.
type Device struct {
	conns []*client.Conn
	next  chan int
}

// New returns the device behind conns, at least one, all in the same export.
func New(conns ...*client.Conn) *Device {
	d := &Device{conns: conns, next: make(chan int, 1)}
	d.next <- 0
	return d
}

// Geometry is what the server said when the first connection entered.
func (d *Device) Geometry() block.Geometry {
	e := d.conns[0].Export()
	return block.Geometry{Name: e.Name, SizeBytes: int64(e.Bytes), LogicalBlockBytes: 512,
		PreferredBytes: int(e.Blocks.Preferred), MaxBytes: int(e.Blocks.Max), ReadOnly: e.Flags&wire.ReadOnly != 0}
}

// do sends a call. Ranges that the protocol cannot carry are refused here; all
// others are the server's to refuse.
func (d *Device) do(ctx context.Context, call *client.Call, off, n int64) error {
	if off < 0 || n < 0 || n > math.MaxUint32 {
		return block.Errorf(block.OutOfRange, "%s of %d bytes at %d", call.Command, n, off)
	}
	call.Off = uint64(off)
	i := <-d.next
	d.next <- (i + 1) % len(d.conns)
	err := d.conns[i].Do(ctx, call)
	size := d.Geometry().SizeBytes
	switch {
	case err == nil:
		return nil
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return block.Wrap(block.Canceled, err, "%s at %d", call.Command, off)
	case off > size || n > size-off:
		return block.Wrap(block.OutOfRange, err, "%s of %d bytes at %d", call.Command, n, off)
	}
	return block.Wrap(kindOf(err), err, "%s at %d", call.Command, off)
}

func kindOf(err error) block.Kind {
	var e wire.Errno
	errors.As(err, &e)
	switch e {
	case wire.EPERM:
		return block.ReadOnly
	case wire.EINVAL:
		return block.Invalid
	case wire.ENOSPC:
		return block.NoSpace
	case wire.ENOTSUP:
		return block.Unsupported
	case wire.ESHUTDOWN:
		return block.Fenced
	}
	return block.Internal
}

// ReadAt implements block.Device.
func (d *Device) ReadAt(ctx context.Context, p []byte, off int64) error {
	// The call goes on when ctx ends first, and the buffer is the caller's then.
	mine := make([]byte, len(p))
	err := d.do(ctx, &client.Call{Command: wire.CmdRead, Data: mine}, off, int64(len(p)))
	if err == nil {
		copy(p, mine)
	}
	return err
}

// WriteAt implements block.Device.
func (d *Device) WriteAt(ctx context.Context, p []byte, off int64, f block.Flags) error {
	return d.do(ctx, &client.Call{Command: wire.CmdWrite, Data: p, Flags: flags(f)}, off, int64(len(p)))
}

// Flush implements block.Device.
func (d *Device) Flush(ctx context.Context) error {
	return d.do(ctx, &client.Call{Command: wire.CmdFlush}, 0, 0)
}

// maxZero is the most that one request without payload covers.
const maxZero = 1<<32 - 64<<10

func (d *Device) zero(ctx context.Context, cmd wire.Command, off, n int64, f block.Flags) error {
	if size := d.Geometry().SizeBytes; off < 0 || n < 0 || off > size || n > size-off {
		return block.Errorf(block.OutOfRange, "%s of %d bytes at %d", cmd, n, off)
	}
	for {
		k := min(n, maxZero)
		if err := d.do(ctx, &client.Call{Command: cmd, Bytes: uint64(k), Flags: flags(f)}, off, k); err != nil || k == n {
			return err
		}
		off, n = off+k, n-k
	}
}

// Trim implements block.Device.
func (d *Device) Trim(ctx context.Context, off, n int64, f block.Flags) error {
	return d.zero(ctx, wire.CmdTrim, off, n, f)
}

// WriteZeroes implements block.Device.
func (d *Device) WriteZeroes(ctx context.Context, off, n int64, f block.Flags) error {
	return d.zero(ctx, wire.CmdWriteZeroes, off, n, f)
}

// Extents implements block.Device.
func (d *Device) Extents(ctx context.Context, dst []block.Extent, off, n int64, max int) ([]block.Extent, error) {
	if size := d.Geometry().SizeBytes; off < 0 || n < 0 || off > size || n > size-off {
		return dst, block.Errorf(block.OutOfRange, "extents of %d bytes at %d", n, off)
	}
	first := len(dst)
	for n > 0 {
		k := min(n, maxZero)
		call := &client.Call{Command: wire.CmdBlockStatus, Bytes: uint64(k)}
		if err := d.do(ctx, call, off, k); err != nil {
			return dst, err
		}
		for _, s := range call.States {
			state := block.Data
			switch s.Flags {
			case wire.StateHole | wire.StateZero:
				state = block.Hole
			case wire.StateZero:
				state = block.Zero
			}
			b := min(int64(s.Length), n)
			if last := len(dst) - 1; last >= first && dst[last].State == state {
				dst[last].Bytes += b
			} else if len(dst)-first == max {
				return dst, nil
			} else {
				dst = append(dst, block.Extent{Bytes: b, State: state})
			}
			off, n = off+b, n-b
		}
	}
	return dst, nil
}

// Prefetch implements block.Prefetcher.
func (d *Device) Prefetch(ctx context.Context, off, n int64) error {
	for {
		k := min(n, maxZero)
		if err := d.do(ctx, &client.Call{Command: wire.CmdCache, Bytes: uint64(k)}, off, k); err != nil || k == n {
			return err
		}
		off, n = off+k, n-k
	}
}

func flags(f block.Flags) (g wire.CommandFlags) {
	if f&block.FUA != 0 {
		g |= wire.FlagFUA
	}
	if f&block.NoHole != 0 {
		g |= wire.FlagNoHole
	}
	if f&block.FastZero != 0 {
		g |= wire.FlagFastZero
	}
	return g
}
