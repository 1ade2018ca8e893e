// Package device makes NBD exports of Firn's own block devices: package nbd
// itself names nothing of Firn, so that others can embed it.
package device

import (
	"context"

	"firn.io/firn/internal/block"
	"firn.io/firn/nbd"
)

// Backend makes an nbd.Backend of a block.Device. It has all optional interfaces;
// it lends only if the device is a block.MemoryReader.
func Backend(d block.Device) nbd.Backend {
	a := &deviceBackend{d: d}
	a.memory, _ = d.(block.MemoryReader)
	a.prefetch, _ = d.(block.Prefetcher)
	return a
}

// Info describes a device of geometry g, attached or not.
func Info(g block.Geometry) nbd.Info {
	// Any byte range works. A volume with blocks of 4096 says so, for clients
	// that show a disk of the same; with 512 they need not care.
	least := 0
	if g.LogicalBlockBytes > 512 {
		least = g.LogicalBlockBytes
	}
	return nbd.Info{
		Name:           g.Name,
		ID:             g.ID.String(),
		Description:    "Firn volume " + g.ID.String(),
		Bytes:          g.SizeBytes,
		ReadOnly:       g.ReadOnly,
		MultiConn:      true,
		MinBlock:       least,
		PreferredBlock: g.PreferredBytes,
		MaxPiece:       g.MaxBytes,
		Offers:         nbd.OfferTrim | nbd.OfferZeroes | nbd.OfferFastZero | nbd.OfferCache | nbd.OfferMap,
	}
}

// Export is an entered export of d. Close is called when the connection
// that entered it has left.
func Export(d block.Device, close func()) *nbd.Export {
	return &nbd.Export{Info: Info(d.Geometry()), Backend: Backend(d), Close: close}
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

func (a *deviceBackend) WriteContext(ctx context.Context, p []byte, off int64, f nbd.Flags) error {
	return a.d.WriteAt(ctx, p, off, deviceFlags(f))
}

func (a *deviceBackend) FlushContext(ctx context.Context) error { return a.d.Flush(ctx) }

func (a *deviceBackend) Trim(ctx context.Context, off, n int64, f nbd.Flags) error {
	return a.d.Trim(ctx, off, n, deviceFlags(f))
}

func (a *deviceBackend) WriteZeroes(ctx context.Context, off, n int64, f nbd.Flags) error {
	return a.d.WriteZeroes(ctx, off, n, deviceFlags(f))
}

// Cache is advice: a device that cannot prefetch has done all it can.
func (a *deviceBackend) Cache(ctx context.Context, off, n int64) error {
	if a.prefetch == nil {
		return nil
	}
	return a.prefetch.Prefetch(ctx, off, n)
}

func (a *deviceBackend) Extents(ctx context.Context, dst []nbd.Extent, off, n int64, max int) ([]nbd.Extent, error) {
	extents, err := a.d.Extents(ctx, nil, off, n, max)
	for _, e := range extents {
		dst = append(dst, nbd.Extent{Bytes: e.Bytes, Hole: e.State == block.Hole, Zero: e.State != block.Data})
	}
	return dst, err
}

func (a *deviceBackend) Lend(off int64, n int) (nbd.Loan, bool) {
	if a.memory == nil {
		return nil, false
	}
	return a.memory.ReadMemory(off, n)
}

func deviceFlags(f nbd.Flags) (g block.Flags) {
	if f&nbd.FUA != 0 {
		g |= block.FUA
	}
	if f&nbd.NoHole != 0 {
		g |= block.NoHole
	}
	if f&nbd.FastZero != 0 {
		g |= block.FastZero
	}
	return g
}
