package gateway

import (
	"context"
	"sync/atomic"

	"firn.io/firn/internal/block"
)

var _ interface {
	block.Device
	block.ResizeNotifier
} = (*Volume)(nil)

// waiter is a caller that waits for an operation on the loop. One of three ends
// it: the operation is answered (wake, then the caller has it again), or the
// caller gives up first (then the loop, which still answers, keeps it).
type waiter struct {
	state atomic.Int32
	woken chan struct{} // of capacity 1
}

const (
	waiting int32 = iota
	answered
	abandoned
)

// answer wakes the caller, and returns false if it has given up.
func (w *waiter) answer() bool {
	if !w.state.CompareAndSwap(waiting, answered) {
		return false
	}
	w.woken <- struct{}{}
	return true
}

// wait returns true when the operation was answered, false when ctx ended first.
func (w *waiter) wait(ctx context.Context) bool {
	select {
	case <-w.woken:
		return true
	case <-ctx.Done():
	}
	if w.state.CompareAndSwap(waiting, abandoned) {
		return false
	}
	<-w.woken
	return true
}

// pending is a change that a caller waits for.
type pending struct {
	change
	waiter
	weight  int64
	startFn func() // bound once, so that posting costs nothing
	endFn   func()
}

func newPending(v *Volume) *pending {
	p := &pending{waiter: waiter{woken: make(chan struct{}, 1)}}
	p.change.init(v)
	p.startFn, p.endFn = p.change.start, p.ended
	return p
}

// ended is called on the loop.
func (p *pending) ended() {
	p.v.budget.Release(p.weight)
	if !p.answer() {
		p.v.stats.abandoned.Add(1)
		p.recycle()
	}
}

func (p *pending) recycle() {
	v := p.v
	p.change.reset()
	p.state.Store(waiting)
	v.changes.Put(p)
}

// enter checks what can be checked before an operation is posted, and takes its
// share of the budget.
func (v *Volume) enter(ctx context.Context, off, n int64, change bool) (weight int64, err error) {
	if err := v.refusal(off, n, change); err != nil {
		return 0, err
	}
	if ctx.Err() != nil {
		return 0, canceled(ctx)
	}
	weight = min(n, v.budgetBytes)
	if v.budget.Acquire(ctx, weight) != nil {
		return 0, canceled(ctx)
	}
	return weight, nil
}

// await posts a prepared change and waits for it.
func (v *Volume) await(ctx context.Context, p *pending, weight int64) error {
	p.ctx, p.weight, p.finish = ctx, weight, p.endFn
	v.loop.Post(p.startFn)
	if !p.wait(ctx) {
		return canceled(ctx)
	}
	err := p.err
	p.recycle()
	return err
}

// WriteAt implements block.Device.
func (v *Volume) WriteAt(ctx context.Context, p []byte, off int64, _ block.Flags) error {
	weight, err := v.enter(ctx, off, int64(len(p)), true)
	if err != nil || len(p) == 0 {
		return err
	}
	c := v.changes.Get().(*pending)
	c.prepareWrite(p, off, v.geom.Load().SizeBytes)
	v.stats.writes.Add(1)
	v.stats.writtenBytes.Add(uint64(len(p)))
	return v.await(ctx, c, weight)
}

// Trim implements block.Device.
func (v *Volume) Trim(ctx context.Context, off, n int64, _ block.Flags) error {
	return v.WriteZeroes(ctx, off, n, 0)
}

// WriteZeroes implements block.Device. It is always fast, and never keeps space.
func (v *Volume) WriteZeroes(ctx context.Context, off, n int64, _ block.Flags) error {
	if err := v.refusal(off, n, true); err != nil {
		return err
	}
	// Of the whole range only the partial blocks are held in memory.
	weight, err := v.enter(ctx, off, min(n, 2*block.Size), true)
	if err != nil || n == 0 {
		return err
	}
	c := v.changes.Get().(*pending)
	c.prepareZero(off, n, v.geom.Load().SizeBytes)
	v.stats.zeroes.Add(1)
	v.stats.zeroedBytes.Add(uint64(n))
	return v.await(ctx, c, weight)
}

// Flush implements block.Device. Every write was durable before it was answered
// (W1), so there is nothing to wait for.
func (v *Volume) Flush(ctx context.Context) error {
	v.stats.flushes.Add(1)
	if err := v.refusal(0, 0, false); err != nil {
		return err
	}
	if ctx.Err() != nil {
		return canceled(ctx)
	}
	return nil
}

// pendingRead is a read that a caller waits for.
type pendingRead struct {
	read
	waiter
	weight  int64
	startFn func()
	endFn   func()
}

func newPendingRead(v *Volume) *pendingRead {
	p := &pendingRead{read: read{v: v}, waiter: waiter{woken: make(chan struct{}, 1)}}
	p.startFn, p.endFn = p.read.start, p.ended
	return p
}

// ended is called on the loop.
func (p *pendingRead) ended() {
	if !p.answer() {
		p.v.stats.abandoned.Add(1)
		p.drop()
		p.recycle()
	}
}

func (p *pendingRead) recycle() {
	v := p.v
	v.budget.Release(p.weight)
	p.read.reset()
	p.state.Store(waiting)
	v.reads.Put(p)
}

// ReadAt implements block.Device.
func (v *Volume) ReadAt(ctx context.Context, p []byte, off int64) error {
	weight, err := v.enter(ctx, off, int64(len(p)), false)
	if err != nil || len(p) == 0 {
		return err
	}
	r := v.reads.Get().(*pendingRead)
	r.prepare(ctx, off, len(p))
	r.weight, r.finish = weight, r.endFn
	v.stats.reads.Add(1)
	v.stats.readBytes.Add(uint64(len(p)))
	v.loop.Post(r.startFn)
	if !r.wait(ctx) {
		return canceled(ctx)
	}
	r.copyTo(p)
	err = r.err
	r.recycle()
	return err
}

// Extents implements block.Device.
func (v *Volume) Extents(ctx context.Context, dst []block.Extent, off, n int64, limit int) ([]block.Extent, error) {
	if err := v.refusal(off, n, false); err != nil || n == 0 {
		return dst, err
	}
	if ctx.Err() != nil {
		return dst, canceled(ctx)
	}
	w := waiter{woken: make(chan struct{}, 1)}
	m := &mapping{v: v, ctx: ctx, off: off, left: n, max: max(1, limit)}
	m.finish = func() { w.answer() }
	v.loop.Post(m.start)
	if !w.wait(ctx) {
		return dst, canceled(ctx)
	}
	return append(dst, m.extents...), m.err
}
