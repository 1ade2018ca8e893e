package sim

import (
	"errors"
	"fmt"
	"hash/fnv"
	"slices"
	"time"

	"firn.io/firn/internal/block"
	"firn.io/firn/internal/clock"
	"firn.io/firn/test/stamp"
)

// slowOperation is worth a line in the log.
const slowOperation = 2 * time.Second

// workload keeps operations in flight on one volume, through however many
// attachments at once believe to have it, and judges every read. Stalls are in
// the world's true time.
type workload struct {
	c       *Cluster
	history *stamp.History
	linear  *linear

	inFlight map[*operation]struct{}
	open     []change // without an answer, in order; they may still take effect
	ended    uint64
	failed   uint64        // of ended; each for a reason that may be
	stall    time.Duration // the longest that an operation took which succeeded
	fault    error
	trace    trace
	newest   *attachment // the last one that was exported
}

// change is a write, trim or resize of an attachment.
type change struct {
	by    *attachment
	write *stamp.Write
	note  *note
	begin clock.Instant
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
	by    *attachment
	begin clock.Instant
	// abandon tells the history that no answer will come.
	abandon func()
}

func newWorkload(c *Cluster, id block.VolumeID) *workload {
	return &workload{c: c, history: stamp.NewHistory(id), linear: newLinear(), inFlight: map[*operation]struct{}{}}
}

// exported takes note of a new attachment: what older ones had in flight takes
// no effect from now on, for a later Fence is committed in every group. Only
// after the metadata were restored from a backup may an older attachment that
// still lives take a new epoch and send again what it has pending.
func (w *workload) exported(now *attachment) {
	w.newest = now
	kept := w.open[:0]
	for _, ch := range w.open {
		if ch.by == now || w.c.restored && !ch.by.over {
			kept = append(kept, ch)
			continue
		}
		ch.write.Over()
		ch.note.over()
	}
	w.open = kept
}

// change begins a change of n sectors; answered takes its end.
func (w *workload) change(by *attachment, what string, from, n int64, p []byte) (op *operation, answered func(error)) {
	op = w.begin(by, what, from*stamp.SectorBytes, n*stamp.SectorBytes)
	wr := w.history.Begin(0, from, n, p)
	ch := change{by: by, write: wr, note: w.linear.write(from, n, wr.Seq(), p == nil), begin: op.begin}
	w.open = append(w.open, ch)
	op.abandon = wr.Unknown
	return op, func(err error) {
		w.end(op, err)
		if err != nil {
			wr.Unknown()
			return
		}
		wr.Acked()
		ch.note.end(0)
		w.open = slices.DeleteFunc(w.open, func(o change) bool { return o.write == wr })
		if n := w.newest; n != by && !w.c.restored && ch.begin > n.since && w.fault == nil {
			w.fault = fmt.Errorf("fence: %s under epoch %d was acknowledged, and epoch %d was exported before it began",
				op.what, by.att.Owner().Epoch, n.att.Owner().Epoch)
		}
	}
}

// step begins one random operation. Operations overlap freely: order among them
// is the volume's business, and the history allows either.
func (w *workload) step(a *attachment) {
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
	sectors := a.volume.Geometry().SizeBytes / stamp.SectorBytes
	n := unit * (1 + r.Int64N(max(1, longest/unit)))
	n = min(n, sectors/unit*unit)
	from := r.Int64N((sectors-n)/unit+1) * unit

	switch dice := r.IntN(100); {
	case dice < 45:
		w.read(a, "read", from, n, func(error) {})
	case dice < 92:
		p := make([]byte, n*stamp.SectorBytes)
		_, answered := w.change(a, "write", from, n, p)
		a.volume.WriteAsync(w.c.ctx, p, from*stamp.SectorBytes, answered)
	default:
		if dice >= 98 { // a trim over whole chunks
			n = min(sectors-from, n+r.Int64N(2*block.ChunkBytes/stamp.SectorBytes))
		}
		_, answered := w.change(a, "zero", from, n, nil)
		a.volume.ZeroAsync(w.c.ctx, from*stamp.SectorBytes, n*stamp.SectorBytes, answered)
	}
}

// read reads n sectors and judges them.
func (w *workload) read(a *attachment, what string, from, n int64, done func(error)) {
	op := w.begin(a, what, from*stamp.SectorBytes, n*stamp.SectorBytes)
	rd := w.history.BeginRead(from)
	notes := w.linear.read(from, n)
	op.abandon = rd.Failed
	a.volume.ReadAsync(w.c.ctx, from*stamp.SectorBytes, int(n*stamp.SectorBytes), func(p []byte, err error) {
		w.end(op, err)
		switch {
		case errors.Is(err, block.Corrupt):
			rd.Failed()
			w.judge(op, err) // of each block a majority has a good copy
		case err != nil:
			rd.Failed()
		default:
			w.judge(op, rd.Check(p))
			notes.end(from, p)
		}
		done(err)
	})
}

// abandon ends what a dead process had in flight, without an answer.
func (w *workload) abandon(dead *process) {
	for op := range w.inFlight {
		if op.by.process == dead {
			op.abandon()
			delete(w.inFlight, op)
		}
	}
}

func (w *workload) begin(by *attachment, what string, off, n int64) *operation {
	op := &operation{what: fmt.Sprintf("%s of %d bytes at %d", what, n, off), by: by, begin: w.c.World.Now()}
	w.inFlight[op] = struct{}{}
	return op
}

// inFlightOf counts the operations of one attachment.
func (w *workload) inFlightOf(a *attachment) (n int) {
	for op := range w.inFlight {
		if op.by == a {
			n++
		}
	}
	return n
}

func (w *workload) end(op *operation, err error) {
	delete(w.inFlight, op)
	w.ended++
	took := w.c.World.Now().Sub(op.begin)
	switch {
	case err == nil:
		w.stall = max(w.stall, took)
	case !excused(err) && w.fault == nil:
		w.fault = fmt.Errorf("error: %s, begun at %v: %w", op.what, w.c.since(op.begin), err)
	default:
		w.failed++
	}
	if took > slowOperation {
		w.c.logf("%s took %v (%v)", op.what, took, err)
	}
	w.trace.add("%d %s %d %v", w.c.World.Now(), op.what, took, err)
}

// excused tells whether an operation may fail so under faults. What else a
// volume answers, and Unavailable, for it waits instead, is a fault of the run.
func excused(err error) bool {
	switch block.KindOf(err) {
	case block.Canceled, block.Fenced, block.NoSpace, block.OutOfRange:
		return true
	}
	return false
}

func (w *workload) judge(op *operation, err error) {
	if err != nil && w.fault == nil {
		w.fault = fmt.Errorf("%s, begun at %v: %w", op.what, w.c.since(op.begin), err)
	}
}

// verify reads the whole volume once, a piece at a time.
func (w *workload) verify(a *attachment, done func()) {
	const piece = 2048 // sectors: 1 MiB
	sectors := a.volume.Geometry().SizeBytes / stamp.SectorBytes
	var next func(from int64)
	next = func(from int64) {
		if from >= sectors || a.over {
			done()
			return
		}
		n := min(piece, sectors-from)
		w.read(a, "last read", from, n, func(err error) {
			if err != nil && !a.over && w.fault == nil {
				w.fault = fmt.Errorf("last read at %d: %w", from*stamp.SectorBytes, err)
			}
			next(from + n)
		})
	}
	next(0)
}
