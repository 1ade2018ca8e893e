package nbd

import (
	"context"
	"sync"
	"sync/atomic"

	"golang.org/x/sync/semaphore"
)

// headroom is the space before a buffer's data for the header of a reply, so
// that header and data are one piece of memory.
const headroom = 64

var bufferSizes = [...]int{4 << 10, 16 << 10, 64 << 10, 256 << 10, maxPiece}

var bufferPools [len(bufferSizes)]sync.Pool

// buffer is pooled payload memory. It belongs to one request at a time.
type buffer struct {
	raw []byte
	// from and to bound what is to be sent or written; data starts at headroom.
	from, to int
	class    int
	charge   charge
}

// data returns the payload.
func (b *buffer) data() []byte { return b.raw[headroom:b.to] }

// wire returns the header, if one was put before the data, and the payload.
func (b *buffer) wire() []byte { return b.raw[b.from:b.to] }

// head puts a header of at most headroom bytes before the data.
func (b *buffer) head(h []byte) {
	b.from = headroom - len(h)
	copy(b.raw[b.from:], h)
}

func bufferClass(n int) int {
	class := 0
	for bufferSizes[class] < n {
		class++
	}
	return class
}

// bufferCost is what a buffer of n bytes takes of the budgets.
func bufferCost(n int) int64 { return int64(bufferSizes[bufferClass(n)] + headroom) }

// newBuffer returns a buffer of n <= maxPiece bytes, which c has paid for.
func newBuffer(n int, c charge) *buffer {
	class := bufferClass(n)
	b, _ := bufferPools[class].Get().(*buffer)
	if b == nil {
		b = &buffer{raw: make([]byte, headroom+bufferSizes[class]), class: class}
	}
	b.from, b.to, b.charge = headroom, headroom+n, c
	return b
}

// free gives the memory and its charge back.
func (b *buffer) free() {
	b.charge.release()
	b.charge = charge{}
	bufferPools[b.class].Put(b)
}

// budget bounds the payload bytes of all connections.
type budget struct {
	total *semaphore.Weighted
	inUse atomic.Int64
}

// allowance is what one connection may hold: reserve bytes without asking
// anyone, so that connections to a volume that hangs cannot starve the others,
// and more out of the common budget, at most own in all.
type allowance struct {
	common  *budget
	own     *semaphore.Weighted
	reserve atomic.Int64
}

// charge is bytes taken from an allowance. The zero charge is none.
type charge struct {
	from   *allowance
	bytes  int64
	common bool
}

func newAllowance(b *budget, own int64) *allowance {
	a := &allowance{common: b, own: semaphore.NewWeighted(own)}
	a.reserve.Store(reserveBytes)
	return a
}

// try takes n bytes if they are free now.
func (a *allowance) try(n int64) (charge, bool) {
	if !a.own.TryAcquire(n) {
		return charge{}, false
	}
	if a.takeReserve(n) {
		return a.charge(n, false), true
	}
	if a.common.total.TryAcquire(n) {
		return a.charge(n, true), true
	}
	a.own.Release(n)
	return charge{}, false
}

// take waits for n bytes. Only the goroutine that reads the connection calls
// it, and it holds nothing that another needs to go on.
func (a *allowance) take(ctx context.Context, n int64) (charge, error) {
	if err := a.own.Acquire(ctx, n); err != nil {
		return charge{}, err
	}
	if a.takeReserve(n) {
		return a.charge(n, false), nil
	}
	if err := a.common.total.Acquire(ctx, n); err != nil {
		a.own.Release(n)
		return charge{}, err
	}
	return a.charge(n, true), nil
}

func (a *allowance) takeReserve(n int64) bool {
	for {
		have := a.reserve.Load()
		if have < n {
			return false
		}
		if a.reserve.CompareAndSwap(have, have-n) {
			return true
		}
	}
}

func (a *allowance) charge(n int64, common bool) charge {
	a.common.inUse.Add(n)
	return charge{a, n, common}
}

func (c charge) release() {
	if c.from == nil {
		return
	}
	c.from.common.inUse.Add(-c.bytes)
	if c.common {
		c.from.common.total.Release(c.bytes)
	} else {
		c.from.reserve.Add(c.bytes)
	}
	c.from.own.Release(c.bytes)
}

// split hands n bytes of a charge to a buffer of their own.
func (c *charge) split(n int64) charge {
	c.bytes -= n
	return charge{c.from, n, c.common}
}
