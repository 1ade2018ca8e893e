package gateway

import (
	"slices"
	"sort"
)

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

	// before counts the claims whose release this one waits for, and after are the
	// claims that wait for this one, in the order in which they came.
	before int
	after  []*mark
}

// marks are the claims on the blocks of a volume. Claims that hold never
// overlap: that is W2. A claim also waits for earlier ones that wait, so that
// they are granted in the order in which they came and none is passed for ever.
// A cache neither serves nor takes in a block under a claim.
//
// Each block has a queue of the claims on it. Only its end is kept: last says which
// claim came last on which blocks, and a new claim waits for those that it finds
// there. Each of them waits for the one before it on the same blocks, and so on,
// so one that is granted has no earlier one left. A claim adds one run to last and
// splits two at most; what it covers it replaces. So claim and release cost what
// they find, and not the number of claims that wait.
type marks struct {
	// last is sorted and disjoint; blocks in no run are under no claim.
	last []run
	// held and waiting count the claims.
	held, waiting int
}

// run is the blocks on which a claim is the last that came.
type run struct {
	span
	of *mark
}

// search returns the first run that ends after block b.
func (ms *marks) search(b uint64) int {
	return sort.Search(len(ms.last), func(i int) bool { return ms.last[i].to > b })
}

// claim asks for m. If m can hold at once it calls m.granted before it returns
// true.
func (ms *marks) claim(m *mark) bool {
	from := ms.search(m.from)
	to := from
	for ; to < len(ms.last) && ms.last[to].from < m.to; to++ {
		// A claim that was split is waited for once.
		if of := ms.last[to].of; len(of.after) == 0 || of.after[len(of.after)-1] != m {
			of.after = append(of.after, m)
			m.before++
		}
	}
	var parts [3]run
	put := parts[:0]
	if to > from {
		if first := ms.last[from]; first.from < m.from {
			put = append(put, run{span{first.from, m.from}, first.of})
		}
	}
	put = append(put, run{m.span, m})
	if to > from {
		if end := ms.last[to-1]; end.to > m.to {
			put = append(put, run{span{m.to, end.to}, end.of})
		}
	}
	ms.last = slices.Replace(ms.last, from, to, put...)
	if m.before > 0 {
		ms.waiting++
		return false
	}
	ms.held++
	m.granted()
	return true
}

// release ends a claim that holds and grants those that only waited for it.
func (ms *marks) release(m *mark) {
	at := ms.search(m.from)
	end := at
	for end < len(ms.last) && ms.last[end].from < m.to {
		end++
	}
	kept := ms.last[at:at]
	for _, r := range ms.last[at:end] {
		if r.of != m {
			kept = append(kept, r)
		}
	}
	ms.last = slices.Delete(ms.last, at+len(kept), end)
	ms.held--
	// m is free to be claimed again, by those who are granted now.
	after := m.after
	m.after = nil
	for i, w := range after {
		after[i] = nil
		if w.before--; w.before == 0 {
			ms.waiting--
			ms.held++
			w.granted()
		}
	}
	if m.after == nil {
		m.after = after[:0]
	}
}
