package nbd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync/atomic"

	"firn.io/firn/nbd/wire"
)

// target is a Backend with its optional interfaces found and the missing ones
// made up for.
type target struct {
	b       Backend
	context ContextBackend
	trimmer Trimmer
	zeroer  Zeroer
	cacher  Cacher
	mapper  Mapper
	lender  Lender

	offers   Offers
	readOnly bool
	piece    int
	// size is what the Backend last said; asked again when a request lies
	// beyond it.
	size atomic.Int64
}

func newTarget(e *Export) *target {
	t := &target{b: e.Backend, readOnly: e.Info.ReadOnly}
	t.context, _ = e.Backend.(ContextBackend)
	t.trimmer, _ = e.Backend.(Trimmer)
	t.zeroer, _ = e.Backend.(Zeroer)
	t.cacher, _ = e.Backend.(Cacher)
	t.mapper, _ = e.Backend.(Mapper)
	t.lender, _ = e.Backend.(Lender)
	t.offers = e.Info.Offers & OffersOf(e.Backend)
	for _, size := range bufferSizes {
		if p := e.Info.MaxPiece; p <= 0 || size <= max(p, bufferSizes[0]) {
			t.piece = size
		}
	}
	t.size.Store(e.Info.Bytes)
	return t
}

// exportFlags are the transmission flags of an export.
func exportFlags(i Info, h wire.Headers) wire.ExportFlags {
	f := wire.HasFlags | wire.SendFlush | wire.SendFUA
	if i.ReadOnly {
		f |= wire.ReadOnly
	} else {
		for offer, flag := range map[Offers]wire.ExportFlags{OfferTrim: wire.SendTrim,
			OfferZeroes: wire.SendWriteZeroes, OfferFastZero: wire.SendFastZero} {
			if i.Offers&offer != 0 {
				f |= flag
			}
		}
	}
	if i.Offers&OfferCache != 0 {
		f |= wire.SendCache
	}
	if i.MultiConn {
		f |= wire.CanMultiConn
	}
	if h != wire.SimpleReplies {
		f |= wire.SendDF
	}
	if h == wire.ExtendedHeaders && i.Offers&OfferMap != 0 {
		f |= wire.BlockStatusPayload
	}
	return f
}

// blockSizes are the constraints that clients are told.
func blockSizes(i Info) wire.BlockSizes {
	power := func(n, fallback int) uint32 {
		if n <= 0 || n > 64<<10 || n&(n-1) != 0 {
			n = fallback
		}
		return uint32(n)
	}
	b := wire.BlockSizes{Min: power(i.MinBlock, 1), Preferred: power(i.PreferredBlock, 4096), Max: wire.MaxPayload}
	b.Preferred = max(b.Preferred, b.Min, 512)
	if n := i.MaxBlock; n&(n-1) == 0 && n >= int(b.Preferred) && n < wire.MaxPayload {
		b.Max = uint32(n)
	}
	return b
}

// covers tells whether [off, off+n) lies within the export.
func (t *target) covers(off, n uint64) bool {
	end := off + n
	if end < off || end > 1<<63-1 {
		return false
	}
	if end <= uint64(t.size.Load()) {
		return true
	}
	size, err := t.b.Size()
	if err != nil || size < 0 {
		return false
	}
	t.size.Store(size)
	return end <= uint64(size)
}

func (t *target) read(ctx context.Context, p []byte, off int64) error {
	if t.context != nil {
		return t.context.ReadContext(ctx, p, off)
	}
	n, err := t.b.ReadAt(p, off)
	if n == len(p) && errors.Is(err, io.EOF) {
		return nil
	}
	if err == nil && n < len(p) {
		return fmt.Errorf("backend read %d of %d bytes at %d: %w", n, len(p), off, io.ErrNoProgress)
	}
	return err
}

func (t *target) write(ctx context.Context, p []byte, off int64, f Flags) error {
	if t.context != nil {
		return t.context.WriteContext(ctx, p, off, f)
	}
	n, err := t.b.WriteAt(p, off)
	if err == nil && n < len(p) {
		err = fmt.Errorf("backend wrote %d of %d bytes at %d: %w", n, len(p), off, io.ErrShortWrite)
	}
	return t.sync(err, f)
}

func (t *target) flush(ctx context.Context) error {
	if t.context != nil {
		return t.context.FlushContext(ctx)
	}
	return t.b.Sync()
}

// sync makes up for a Backend that does not know FUA.
func (t *target) sync(err error, f Flags) error {
	if err == nil && f&FUA != 0 {
		return t.b.Sync()
	}
	return err
}

var zeroes [64 << 10]byte

func (t *target) writeZeroes(ctx context.Context, off, n int64, f Flags) error {
	if t.zeroer != nil {
		return t.zeroer.WriteZeroes(ctx, off, n, f)
	}
	if f&FastZero != 0 {
		return wire.ENOTSUP
	}
	for n > 0 {
		if err := ctx.Err(); err != nil {
			return err
		}
		k := min(n, int64(len(zeroes)))
		if err := t.write(ctx, zeroes[:k], off, f); err != nil {
			return err
		}
		off, n = off+k, n-k
	}
	return nil
}

// states appends the extents of [off, off+n) in the terms of base:allocation,
// at most max and at least one.
func (t *target) states(ctx context.Context, off, n int64, max int) ([]wire.State, error) {
	extents, err := t.mapper.Extents(ctx, nil, off, n, max)
	if err != nil {
		return nil, err
	}
	var states []wire.State
	for _, e := range extents {
		if e.Bytes <= 0 || n == 0 || len(states) == max {
			break
		}
		var f uint64
		if e.Hole {
			f |= wire.StateHole
		}
		if e.Zero {
			f |= wire.StateZero
		}
		k := min(e.Bytes, n)
		states = append(states, wire.State{Length: uint64(k), Flags: f})
		n -= k
	}
	if len(states) == 0 {
		return nil, fmt.Errorf("backend knows no extent at %d", off)
	}
	return states, nil
}
