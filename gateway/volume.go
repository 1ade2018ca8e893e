package gateway

import (
	"context"
	"sync"
	"sync/atomic"

	"golang.org/x/sync/semaphore"

	"firn.io/firn/internal/block"
	"firn.io/firn/internal/loop"
)

// Volume is an attached volume. It is a block.Device and a block.ResizeNotifier
// (shell_device.go); on the Loop, ReadAsync, WriteAsync, ZeroAsync and
// ExtentsAsync are the same without waiting.
//
// Invariants of the core:
//   - Blocks that a change is about are claimed in marks from before its first
//     call to the Backend until the last one has answered. Claims are disjoint.
//   - A change claims all its blocks at once, so claims cannot wait in a circle.
//   - A caller that gives up ends its wait, not its change.
//   - Once ended, nothing is sent any more.
type Volume struct {
	loop    loop.Loop
	backend Backend

	// Written on the loop, read anywhere.
	geom  atomic.Pointer[block.Geometry]
	over  atomic.Pointer[error] // why the attachment ended
	stats counters

	// On the loop.
	marks   marks
	merger  merger
	onEnded func(error)

	// budget bounds the bytes of the operations that are in flight, counting
	// those that nobody waits for any more. Operations above the whole of it
	// count as the whole.
	budget      *semaphore.Weighted
	budgetBytes int64
	changes     sync.Pool // *pending
	reads       sync.Pool // *pendingRead

	notifyMu sync.Mutex
	notify   map[int]func(block.Geometry)
	notifyID int
}

// Limits of one Volume.
type Limits struct {
	// BytesInFlight bounds what reads and writes hold in memory, in bytes; 0 is
	// DefaultBytesInFlight.
	BytesInFlight int64
}

// DefaultBytesInFlight suits a queue of 64 requests of 1 MiB.
const DefaultBytesInFlight = 64 << 20

// NewVolume serves an attached volume. It is called on the loop, where ended, if
// not nil, is called when the attachment is over.
func NewVolume(l loop.Loop, b Backend, limits Limits, ended func(error)) *Volume {
	if limits.BytesInFlight <= 0 {
		limits.BytesInFlight = DefaultBytesInFlight
	}
	v := &Volume{loop: l, backend: b, onEnded: ended, budgetBytes: limits.BytesInFlight,
		budget: semaphore.NewWeighted(limits.BytesInFlight), notify: map[int]func(block.Geometry){}}
	v.changes.New = func() any { return newPending(v) }
	v.reads.New = func() any { return newPendingRead(v) }
	v.merger.v = v
	g := b.Geometry()
	v.geom.Store(&g)
	b.Watch(v.changed, v.end)
	return v
}

// Geometry implements block.Device.
func (v *Volume) Geometry() block.Geometry { return *v.geom.Load() }

func (v *Volume) changed() {
	g := v.backend.Geometry()
	v.geom.Store(&g)
	v.notifyMu.Lock()
	defer v.notifyMu.Unlock()
	for _, f := range v.notify {
		f(g)
	}
}

// NotifyResize implements block.ResizeNotifier. f is called on the loop: it
// must not block, nor call stop.
func (v *Volume) NotifyResize(f func(block.Geometry)) (stop func()) {
	v.notifyMu.Lock()
	defer v.notifyMu.Unlock()
	id := v.notifyID
	v.notifyID++
	v.notify[id] = f
	return func() {
		v.notifyMu.Lock()
		defer v.notifyMu.Unlock()
		delete(v.notify, id)
	}
}

func (v *Volume) end(err error) {
	if v.over.Load() != nil {
		return
	}
	v.over.Store(&err)
	v.merger.next()
	if v.onEnded != nil {
		v.onEnded(err)
	}
}

// Detach ends the attachment, on the loop. What is in flight fails; done is
// called when others may attach the volume.
func (v *Volume) Detach(done func(error)) {
	err := block.Errorf(block.Canceled, "volume %q was detached", v.Geometry().Name)
	v.over.CompareAndSwap(nil, &err)
	v.merger.next()
	v.backend.Close(done)
}

// refusal tells why an operation cannot be done, as far as known here.
func (v *Volume) refusal(off, n int64, change bool) error {
	if over := v.over.Load(); over != nil {
		return *over
	}
	g := v.geom.Load()
	switch {
	case off < 0 || n < 0 || off > g.SizeBytes || n > g.SizeBytes-off:
		return block.Errorf(block.OutOfRange, "%d bytes at %d are beyond the %d bytes of volume %q", n, off, g.SizeBytes, g.Name)
	case change && g.ReadOnly:
		return block.Errorf(block.ReadOnly, "volume %q is read-only", g.Name)
	}
	return nil
}

// counters count since the volume was attached.
type counters struct {
	reads, readBytes, writes, writtenBytes, zeroes, zeroedBytes, flushes, edges, waited, abandoned, joined, joins atomic.Uint64
}

// Stats is what a volume has done since it was attached.
type Stats struct {
	Reads, ReadBytes, Writes, WrittenBytes, Zeroes, ZeroedBytes, Flushes uint64
	// EdgeReads are blocks read for the sake of unaligned changes.
	EdgeReads uint64
	// Waited are changes that waited for another one of the same blocks.
	Waited uint64
	// Abandoned are operations whose caller gave up.
	Abandoned uint64
	// Joined are large changes to zeros that were carried out as part of Joins
	// still larger ones (merger).
	Joined, Joins uint64
}

// Stats may be called from any goroutine.
func (v *Volume) Stats() Stats {
	s := &v.stats
	return Stats{Reads: s.reads.Load(), ReadBytes: s.readBytes.Load(), Writes: s.writes.Load(), WrittenBytes: s.writtenBytes.Load(),
		Zeroes: s.zeroes.Load(), ZeroedBytes: s.zeroedBytes.Load(), Flushes: s.flushes.Load(), EdgeReads: s.edges.Load(),
		Waited: s.waited.Load(), Abandoned: s.abandoned.Load(), Joined: s.joined.Load(), Joins: s.joins.Load()}
}

// WriteAsync writes p at off, on the loop; done is called on it. p is not kept.
// The Async methods are not bound by Limits: their caller bounds them.
func (v *Volume) WriteAsync(ctx context.Context, p []byte, off int64, done func(error)) {
	if !v.ready(ctx, off, int64(len(p)), true, done) {
		return
	}
	c := &change{}
	c.init(v)
	c.prepareWrite(p, off, v.geom.Load().SizeBytes)
	v.run(ctx, c, done)
}

// ZeroAsync makes [off, off+n) zero, on the loop; done is called on it.
func (v *Volume) ZeroAsync(ctx context.Context, off, n int64, done func(error)) {
	if !v.ready(ctx, off, n, true, done) {
		return
	}
	c := &change{}
	c.init(v)
	c.prepareZero(off, n, v.geom.Load().SizeBytes)
	v.run(ctx, c, done)
}

func (v *Volume) run(ctx context.Context, c *change, done func(error)) {
	c.ctx = ctx
	c.finish = func() { done(c.err) }
	c.start()
}

// ready answers an operation at once if it is refused or empty.
func (v *Volume) ready(ctx context.Context, off, n int64, change bool, done func(error)) bool {
	err := v.refusal(off, n, change)
	if err == nil && ctx.Err() != nil {
		err = canceled(ctx)
	}
	if err != nil || n == 0 {
		v.loop.Post(func() { done(err) })
		return false
	}
	return true
}

// ReadAsync reads n bytes at off, on the loop; done is called on it.
func (v *Volume) ReadAsync(ctx context.Context, off int64, n int, done func([]byte, error)) {
	if !v.ready(ctx, off, int64(n), false, func(err error) { done(nil, err) }) {
		return
	}
	r := &read{v: v}
	r.prepare(ctx, off, n)
	r.finish = func() {
		p := make([]byte, n)
		r.copyTo(p)
		if r.err != nil {
			p = nil
		}
		done(p, r.err)
	}
	r.start()
}

// ExtentsAsync maps [off, off+n) as block.Device's Extents does, on the loop.
func (v *Volume) ExtentsAsync(ctx context.Context, off, n int64, limit int, done func([]block.Extent, error)) {
	if !v.ready(ctx, off, n, false, func(err error) { done(nil, err) }) {
		return
	}
	m := &mapping{v: v, ctx: ctx, off: off, left: n, max: max(1, limit)}
	m.finish = func() { done(m.extents, m.err) }
	m.start()
}
