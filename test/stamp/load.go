package stamp

import (
	"cmp"
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"
)

// Device is what a Load works on: an NBD client, an iSCSI client, a volume.
// Methods are called by many goroutines.
type Device interface {
	ReadAt(ctx context.Context, p []byte, off int64) error
	WriteAt(ctx context.Context, p []byte, off int64) error
	Trim(ctx context.Context, off, n int64) error
	Flush(ctx context.Context) error
}

// Options of a Load. Zero values mean what is said.
type Options struct {
	Seed       uint64
	Volume     [16]byte
	Sectors    int64 // the range that is used, from sector 0
	Workers    int   // operations in flight; 0 means 8
	MaxSectors int   // longest operation; 0 means 64 (32 KiB)
	// AlignSectors is the alignment of operations; 0 means 1 (512 B), 8 is 4 KiB.
	AlignSectors int
	// ReadPercent and TrimPercent of the operations; the rest are writes.
	ReadPercent, TrimPercent int
	// ErrorsEnd makes the first failed operation end the load with its error.
	// Otherwise a failed write or trim is of unknown outcome and the load goes on.
	ErrorsEnd bool
}

// maxWorkers bounds the operations in flight of a load.
const maxWorkers = 256

// Load runs random operations and judges every read.
type Load struct {
	o       Options
	history *History

	ops     atomic.Uint64
	longest atomic.Int64
}

// NewLoad returns a load over a device that reads as zero.
func NewLoad(o Options) *Load {
	if o.Workers == 0 {
		o.Workers = 8
	}
	if o.MaxSectors == 0 {
		o.MaxSectors = 64
	}
	if o.AlignSectors == 0 {
		o.AlignSectors = 1
	}
	o.Workers = min(o.Workers, maxWorkers)
	return &Load{o: o, history: NewHistory(o.Volume)}
}

// History is what the load has done so far.
func (l *Load) History() *History { return l.history }

// Operations returns how many operations have ended.
func (l *Load) Operations() uint64 { return l.ops.Load() }

// LongestStall returns the longest time that one operation has taken.
func (l *Load) LongestStall() time.Duration { return time.Duration(l.longest.Load()) }

// ResetStall forgets the longest stall.
func (l *Load) ResetStall() { l.longest.Store(0) }

// Run works on dev until ctx ends, a read is wrong or, with ErrorsEnd, an
// operation fails, and returns the first such error: also of an operation that was
// in flight when ctx ended, if what it read is wrong. It may be called again, on another connection to the same
// volume: what is in flight when ctx ends stays of unknown outcome. now tells
// the time for the stall that is reported; it decides nothing.
func (l *Load) Run(ctx context.Context, dev Device, now func() time.Duration) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var wg sync.WaitGroup
	var mu sync.Mutex
	var first error
	for w := range l.o.Workers {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(l.o.Seed+l.ops.Load(), uint64(w)))
			for ctx.Err() == nil {
				err := l.step(ctx, dev, uint32(w), r, now)
				if err == nil {
					continue
				}
				mu.Lock()
				first = cmp.Or(first, err)
				mu.Unlock()
				cancel()
			}
		})
	}
	wg.Wait()
	return first
}

func (l *Load) step(ctx context.Context, dev Device, worker uint32, r *rand.Rand, now func() time.Duration) error {
	align := int64(l.o.AlignSectors)
	slots := l.o.Sectors / align
	n := 1 + r.Int64N(max(1, int64(l.o.MaxSectors)/align))
	n = min(n, slots)
	from := r.Int64N(slots-n+1) * align
	n *= align
	off, length := from*SectorBytes, n*SectorBytes

	begin := now()
	defer func() {
		took := int64(now() - begin)
		for old := l.longest.Load(); took > old && !l.longest.CompareAndSwap(old, took); old = l.longest.Load() {
		}
		l.ops.Add(1)
	}()
	failed := func(what string, err error) error {
		if !l.o.ErrorsEnd || ctx.Err() != nil {
			return nil
		}
		return fmt.Errorf("%s of %d bytes at %d: %w", what, length, off, err)
	}
	dice := r.IntN(100)
	if dice < l.o.ReadPercent {
		rd := l.history.BeginRead(from)
		p := make([]byte, length)
		if err := dev.ReadAt(ctx, p, off); err != nil {
			rd.Failed()
			return failed("read", err)
		}
		return rd.Check(p)
	}
	var w *Write
	var err error
	what := "write"
	if dice < l.o.ReadPercent+l.o.TrimPercent {
		what = "trim"
		w = l.history.Begin(worker, from, n, nil)
		err = dev.Trim(ctx, off, length)
	} else {
		p := make([]byte, length)
		w = l.history.Begin(worker, from, n, p)
		err = dev.WriteAt(ctx, p, off)
	}
	if err != nil {
		w.Unknown()
		return failed(what, err)
	}
	w.Acked()
	if dice == 99 {
		if err := dev.Flush(ctx); err != nil {
			return failed("flush", err)
		}
	}
	return nil
}

// Verify reads the whole range once and judges it.
func (l *Load) Verify(ctx context.Context, dev Device) error {
	const step = 2048 // sectors: 1 MiB
	for from := int64(0); from < l.o.Sectors; from += step {
		n := min(step, l.o.Sectors-from)
		rd := l.history.BeginRead(from)
		p := make([]byte, n*SectorBytes)
		if err := dev.ReadAt(ctx, p, from*SectorBytes); err != nil {
			rd.Failed()
			return fmt.Errorf("read of %d bytes at %d: %w", len(p), from*SectorBytes, err)
		}
		if err := rd.Check(p); err != nil {
			return err
		}
	}
	return nil
}
