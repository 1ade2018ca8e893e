package gateway

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"time"

	"firn.io/firn/internal/block"
)

// mergeBytes is the least length of a change to zeros that merges with others.
const mergeBytes = 64 << 20

// mergeWait is how long the next batch waits after one of several changes: who
// has just been answered sends more. Without it batches of one and of all others
// would take turns.
const mergeWait = time.Millisecond

// merger joins large changes to zeros that come while others are at work. A
// client that discards a device sends thousands of requests one behind the other
// (the kernel: of 4 GiB less a block), and each alone would be a range marker in
// every group. One batch is at work at a time; what comes meanwhile is the next
// one, in which neighbours become one change. All of it is on the loop.
type merger struct {
	v     *Volume
	queue []*change
	// left is how many changes of the batch at work have not ended.
	left int
	// several: the batch that is or was at work is of more than one change, as
	// they came.
	several bool
	// gathering: the next batch waits for mergeWait to be over.
	gathering bool
}

// admit starts c, or keeps it for the next batch. c has been checked.
func (m *merger) admit(c *change) {
	if m.left > 0 || m.gathering {
		m.queue = append(m.queue, c)
		return
	}
	m.left, m.several = 1, false
	c.merged = true
	c.claim()
}

// done is called when a change of the batch has ended.
func (m *merger) done() {
	if m.left--; m.left > 0 {
		return
	}
	m.several = m.several || len(m.queue) > 0
	if !m.several {
		return
	}
	m.gathering = true
	if m.v.over.Load() != nil {
		m.next()
		return
	}
	m.v.loop.After(mergeWait, m.next)
}

// next starts what has been gathered. At the end of the volume, which refuses
// it, it does not wait for the time to be over.
func (m *merger) next() {
	if !m.gathering {
		return
	}
	m.gathering = false
	if len(m.queue) == 0 {
		return
	}
	var batch []*change
	m.left = 1 // holds the batch together until all of it has started
	queue := m.queue
	m.queue = nil // who hears of a refusal may send more
	for _, c := range queue {
		if err := c.v.refusal(c.off, c.n, true); err != nil { // the volume has shrunk or ended
			c.fail(err)
			continue
		}
		batch = append(batch, c)
	}
	m.several = len(batch) > 1
	slices.SortFunc(batch, func(a, b *change) int { return cmp.Compare(a.off, b.off) })
	for len(batch) > 0 {
		n, end := 1, batch[0].off+batch[0].n
		for n < len(batch) && batch[n].off <= end {
			end = max(end, batch[n].off+batch[n].n)
			n++
		}
		m.start(batch[:n], end)
		batch = batch[n:]
	}
	m.done()
}

// start begins one run of neighbours that ends at end.
func (m *merger) start(run []*change, end int64) {
	m.left++
	c := run[0]
	if len(run) > 1 {
		m.v.stats.joined.Add(uint64(len(run)))
		m.v.stats.joins.Add(1)
		c = &change{}
		c.init(run[0].v)
		// Those who gave up ended their wait, not the change.
		c.ctx = context.Background()
		c.prepareZero(run[0].off, end-run[0].off, c.v.geom.Load().SizeBytes)
		c.finish = func() {
			for _, each := range run {
				if errors.Is(c.err, block.OutOfRange) { // the volume shrank: each is judged by itself
					each.claim()
					continue
				}
				each.fail(c.err)
			}
		}
	}
	c.merged = true
	c.claim()
}
