package index

import (
	"firn.io/firn/cluster/wire"
	"firn.io/firn/internal/block"
)

// maxOpSeq is above every opSeq that a counter reaches.
const maxOpSeq = block.OpSeq(1) << 62

// window remembers the outcomes of the operations at and above the floor, two
// bits each (W3). All below the floor have had their answer; opSeqs from
// floor+4096 on are never judged. Which refusal it was is kept aside, since
// refusals are rare.
//
// The bits lie in a ring of a power of two entries that grows as far as the
// sender's concurrency asks; entries outside [floor, floor+ring) are absent.
type window struct {
	floor    block.OpSeq
	ring     []uint64 // 32 entries a word
	refusals map[block.OpSeq]wire.Outcome
}

const (
	opAbsent  = 0
	opApplied = 1
	opRefused = 2

	perWord  = 32
	minWords = 2
)

func (w *window) size() block.OpSeq { return block.OpSeq(len(w.ring) * perWord) }

func (w *window) at(op block.OpSeq) (word *uint64, shift uint) {
	i := op % w.size()
	return &w.ring[i/perWord], uint(i%perWord) * 2
}

// reset forgets everything: a new attachment counts from 1.
func (w *window) reset() { *w = window{floor: 1} }

// raise moves the floor up to f and forgets what is below it.
func (w *window) raise(f block.OpSeq) {
	if f <= w.floor {
		return
	}
	if f-w.floor >= w.size() {
		clear(w.ring)
		w.refusals = nil
		w.floor = f
		return
	}
	for ; w.floor < f; w.floor++ {
		word, shift := w.at(w.floor)
		*word &^= 3 << shift
		if w.refusals != nil {
			delete(w.refusals, w.floor)
		}
	}
}

// outcome returns what is remembered of op, which is within the window.
func (w *window) outcome(op block.OpSeq) (wire.Outcome, bool) {
	if op-w.floor >= w.size() {
		return 0, false
	}
	word, shift := w.at(op)
	switch *word >> shift & 3 {
	case opApplied:
		return wire.OutcomeApplied, true
	case opRefused:
		return w.refusals[op], true
	}
	return 0, false
}

// remember notes the outcome of op, which is within the window and absent.
func (w *window) remember(op block.OpSeq, o wire.Outcome) {
	if op-w.floor >= w.size() {
		w.grow(op - w.floor + 1)
	}
	word, shift := w.at(op)
	if o == wire.OutcomeApplied {
		*word |= opApplied << shift
		return
	}
	*word |= opRefused << shift
	if w.refusals == nil {
		w.refusals = make(map[block.OpSeq]wire.Outcome)
	}
	w.refusals[op] = o
}

func (w *window) grow(need block.OpSeq) {
	old := *w
	words := max(minWords, len(w.ring))
	for block.OpSeq(words*perWord) < need {
		words *= 2
	}
	w.ring = make([]uint64, words)
	for op := old.floor; op < old.floor+old.size(); op++ {
		from, shift := old.at(op)
		to, shift2 := w.at(op)
		*to |= *from >> shift & 3 << shift2
	}
}

// append encodes the window: floor, number of entries up to the last one that
// is present, the entries four a byte, then one byte for each refusal in order.
func (w *window) append(dst []byte) []byte {
	dst = appendUint64(dst, uint64(w.floor))
	n := 0
	for i := int(w.size()) - 1; i >= 0; i-- {
		if _, ok := w.outcome(w.floor + block.OpSeq(i)); ok {
			n = i + 1
			break
		}
	}
	dst = append(dst, byte(n), byte(n>>8))
	packed := len(dst)
	dst = append(dst, make([]byte, (n+3)/4)...)
	for i := range n {
		o, ok := w.outcome(w.floor + block.OpSeq(i))
		switch {
		case !ok:
		case o == wire.OutcomeApplied:
			dst[packed+i/4] |= opApplied << (i % 4 * 2)
		default:
			dst[packed+i/4] |= opRefused << (i % 4 * 2)
			dst = append(dst, byte(o))
		}
	}
	return dst
}

// decodeWindow takes a window off the front of p, whose first bytes it must be.
func decodeWindow(p []byte) (w window, rest []byte, ok bool) {
	if len(p) < 10 {
		return w, nil, false
	}
	w.floor = block.OpSeq(takeUint64(&p))
	n := int(p[0]) | int(p[1])<<8
	p = p[2:]
	if n > wire.OpWindow || w.floor >= maxOpSeq || len(p) < (n+3)/4 {
		return w, nil, false
	}
	packed, p := p[:(n+3)/4], p[(n+3)/4:]
	for i := range len(packed) * 4 {
		state := packed[i/4] >> (i % 4 * 2) & 3
		op := w.floor + block.OpSeq(i)
		switch {
		case state != opAbsent && i >= n, i == n-1 && state == opAbsent:
			return w, nil, false
		case state == opAbsent:
		case state == opApplied:
			w.remember(op, wire.OutcomeApplied)
		case state == opRefused && len(p) > 0 && remembered(wire.Outcome(p[0])):
			w.remember(op, wire.Outcome(p[0]))
			p = p[1:]
		default:
			return w, nil, false
		}
	}
	return w, p, true
}

// remembered tells whether o is a refusal that ends an operation.
func remembered(o wire.Outcome) bool { return o.Definite() && o != wire.OutcomeApplied }
