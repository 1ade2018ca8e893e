package sim

import (
	"context"
	"fmt"
	"hash/fnv"
	"io"
	"time"

	"firn.io/firn/internal/block"
	"firn.io/firn/internal/clock"
	"firn.io/firn/test/stamp"
)

// volume is what a workload works on: the asynchronous side of gateway.Volume.
type volume interface {
	ReadAsync(ctx context.Context, off int64, n int, done func([]byte, error))
	WriteAsync(ctx context.Context, p []byte, off int64, done func(error))
	ZeroAsync(ctx context.Context, off, n int64, done func(error))
}

// workload keeps operations in flight on one volume and judges every read.
// Stalls are in the world's true time.
type workload struct {
	c       *Cluster
	history *stamp.History
	sectors int64

	inFlight map[*operation]struct{}
	ended    uint64
	failed   uint64
	stall    time.Duration // the longest that an operation took which succeeded
	fault    error
	trace    trace
}

// trace is a running hash of all that operations did and when.
type trace struct{ h uint64 }

func (t *trace) add(format string, args ...any) {
	f := fnv.New64a()
	fmt.Fprintf(f, "%016x ", t.h)
	fmt.Fprintf(f, format, args...)
	t.h = f.Sum64()
}

type operation struct {
	what  string
	begin clock.Instant
	// abandon tells the history that no answer will come.
	abandon func()
}

func newWorkload(c *Cluster, id block.VolumeID, sizeBytes int64) *workload {
	return &workload{c: c, history: stamp.NewHistory(id), sectors: sizeBytes / stamp.SectorBytes, inFlight: map[*operation]struct{}{}}
}

// step begins one random operation on v. Operations overlap freely: order among
// them is the volume's business, and the history allows either.
func (w *workload) step(v volume) {
	r := w.c.World.Rand()
	unit := int64(1)
	if r.IntN(3) > 0 {
		unit = 8 // most are of whole blocks
	}
	longest := int64(16)
	switch r.IntN(20) {
	case 0:
		longest = 512 // 256 KiB
	case 1:
		longest = 4096 // 2 MiB: several entries
	}
	n := unit * (1 + r.Int64N(max(1, longest/unit)))
	n = min(n, w.sectors)
	from := r.Int64N((w.sectors-n)/unit+1) * unit
	off, length := from*stamp.SectorBytes, n*stamp.SectorBytes

	switch dice := r.IntN(100); {
	case dice < 45:
		op := w.begin("read", off, length)
		rd := w.history.BeginRead(from)
		op.abandon = rd.Failed
		v.ReadAsync(w.c.ctx, off, int(length), func(p []byte, err error) {
			w.end(op, err)
			if err != nil {
				rd.Failed()
				return
			}
			w.judge(op, rd.Check(p))
		})
	case dice < 92:
		op := w.begin("write", off, length)
		p := make([]byte, length)
		wr := w.history.Begin(0, from, n, p)
		op.abandon = wr.Unknown
		v.WriteAsync(w.c.ctx, p, off, func(err error) { w.end(op, err); settle(wr, err) })
	default:
		if dice >= 98 { // a trim over whole chunks
			n = min(w.sectors-from, n+r.Int64N(2*block.ChunkBytes/stamp.SectorBytes))
			length = n * stamp.SectorBytes
		}
		op := w.begin("zero", off, length)
		wr := w.history.Begin(0, from, n, nil)
		op.abandon = wr.Unknown
		v.ZeroAsync(w.c.ctx, off, length, func(err error) { w.end(op, err); settle(wr, err) })
	}
}

func settle(w *stamp.Write, err error) {
	if err != nil {
		w.Unknown()
	} else {
		w.Acked()
	}
}

// abandon ends everything in flight without an answer: its gateway is dead.
func (w *workload) abandon() {
	for op := range w.inFlight {
		if op.abandon != nil {
			op.abandon()
		}
	}
	clear(w.inFlight)
}

func (w *workload) begin(what string, off, n int64) *operation {
	op := &operation{what: fmt.Sprintf("%s of %d bytes at %d", what, n, off), begin: w.c.World.Now()}
	w.inFlight[op] = struct{}{}
	return op
}

func (w *workload) end(op *operation, err error) {
	delete(w.inFlight, op)
	w.ended++
	took := w.c.World.Now().Sub(op.begin)
	if err != nil {
		w.failed++
	} else {
		w.stall = max(w.stall, took)
	}
	w.trace.add("%d %s %d %v", w.c.World.Now(), op.what, took, err)
}

func (w *workload) judge(op *operation, err error) {
	if err != nil && w.fault == nil {
		w.fault = fmt.Errorf("%s, begun at %v: %w", op.what, w.c.since(op.begin), err)
	}
}

// verify reads the whole volume once, a piece at a time.
func (w *workload) verify(v volume, done func()) {
	const piece = 2048 // sectors: 1 MiB
	var next func(from int64)
	next = func(from int64) {
		if from >= w.sectors {
			done()
			return
		}
		n := min(piece, w.sectors-from)
		op := w.begin("last read", from*stamp.SectorBytes, n*stamp.SectorBytes)
		rd := w.history.BeginRead(from)
		v.ReadAsync(w.c.ctx, from*stamp.SectorBytes, int(n*stamp.SectorBytes), func(p []byte, err error) {
			w.end(op, err)
			if err != nil {
				rd.Failed()
				w.judge(op, err)
			} else {
				w.judge(op, rd.Check(p))
			}
			next(from + n)
		})
	}
	next(0)
}

func (w *workload) report(out io.Writer) {
	acked, unknown, checked := w.history.Counts()
	fmt.Fprintf(out, "%d operations (%d failed), %d writes acknowledged, %d of unknown outcome, %d sectors judged, longest stall %v\n",
		w.ended, w.failed, acked, unknown, checked, w.stall)
}
