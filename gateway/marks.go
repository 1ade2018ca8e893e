package gateway

import "sort"

// span is the blocks [from, to) of a volume, counted over the whole volume.
type span struct {
	from, to uint64
}

func (s span) overlaps(o span) bool { return s.from < o.to && o.from < s.to }

// mark is one operation's claim on its blocks. granted is called when the claim
// holds: at once, or when those before it are gone.
type mark struct {
	span
	granted func()
}

// marks are the claims on the blocks of a volume. Claims that hold never
// overlap: that is W2. A claim also waits for earlier ones that wait, so that
// they are granted in the order in which they came and none is passed for ever.
// A cache neither serves nor takes in a block under a claim.
type marks struct {
	// held is sorted. Since held claims are disjoint, both ends are in order.
	held    []*mark
	waiting []*mark
}

// search returns the first held claim that ends after block b.
func (ms *marks) search(b uint64) int {
	return sort.Search(len(ms.held), func(i int) bool { return ms.held[i].to > b })
}

// claim asks for m. If m can hold at once it calls m.granted before it returns
// true.
func (ms *marks) claim(m *mark) bool {
	if behindAny(ms.waiting, m) || !ms.take(m) {
		ms.waiting = append(ms.waiting, m)
		return false
	}
	m.granted()
	return true
}

func (ms *marks) take(m *mark) bool {
	at := ms.search(m.from)
	if at < len(ms.held) && ms.held[at].from < m.to {
		return false
	}
	ms.held = append(ms.held, nil)
	copy(ms.held[at+1:], ms.held[at:])
	ms.held[at] = m
	return true
}

// release ends a claim that holds and grants those that only waited for it.
func (ms *marks) release(m *mark) {
	at := ms.search(m.from)
	copy(ms.held[at:], ms.held[at+1:])
	ms.held[len(ms.held)-1] = nil
	ms.held = ms.held[:len(ms.held)-1]
	if len(ms.waiting) == 0 {
		return
	}
	var granted []*mark
	still := ms.waiting[:0]
	for _, w := range ms.waiting {
		if behindAny(still, w) || !ms.take(w) {
			still = append(still, w)
			continue
		}
		granted = append(granted, w)
	}
	clear(ms.waiting[len(still):])
	ms.waiting = still
	for _, w := range granted {
		w.granted()
	}
}

func behindAny(earlier []*mark, m *mark) bool {
	for _, e := range earlier {
		if e.overlaps(m.span) {
			return true
		}
	}
	return false
}
