package seglog

import (
	"fmt"
	"slices"
	"sort"

	"firn.io/firn/internal/block"
)

// slot is where an entry is: 16 bytes per entry above the truncation. While the
// entry waits to be laid out in a batch, segment is 0 and (batch, ord) hold the
// low half of the number of its Write.
type slot struct {
	segment SegmentID
	bytes   uint32 // of payload
	batch   uint16 // block of the batch's header
	ord     uint16 // of the entry among those of its batch
	payload uint16 // block where the payload begins
	_       uint16
}

func pendingSlot(seq uint32, bytes int) slot {
	return slot{bytes: uint32(bytes), batch: uint16(seq >> 16), ord: uint16(seq)}
}

func (s slot) pendingOf(seq uint32) bool {
	return s.segment == 0 && s.batch == uint16(seq>>16) && s.ord == uint16(seq)
}

// termRun says that entries from index on have a term.
type termRun struct{ index, term uint64 }

// Replica is one replica's log on the disk. It sees writes at once, durable or
// not; only Locate and Read see what is durable alone. Called on the Loop, but
// for Read.
type Replica struct {
	log *Log
	key ReplicaKey

	// slots[head+i] is entry trunc.Index+1+i.
	slots   []slot
	head    int
	runs    []termRun // of entries above the truncation, rising
	trunc   EntryID
	hard    HardState
	durable uint64 // entries up to here are on the disk

	// laid is what the last section that was laid out said.
	laid struct {
		exists bool
		hard   HardState
		trunc  EntryID
		last   EntryID
	}
	removed bool
	damage  string
}

// Key returns the replica's name.
func (r *Replica) Key() ReplicaKey { return r.key }

// Truncated is the last entry that was forgotten.
func (r *Replica) Truncated() EntryID { return r.trunc }

// FirstIndex is the index after the truncation.
func (r *Replica) FirstIndex() uint64 { return r.trunc.Index + 1 }

// LastIndex is the index of the newest entry, FirstIndex-1 if there is none.
func (r *Replica) LastIndex() uint64 { return r.trunc.Index + uint64(len(r.slots)-r.head) }

// Durable is the index up to which entries are on the disk.
func (r *Replica) Durable() uint64 { return r.durable }

// HardState is the newest one, durable or not.
func (r *Replica) HardState() HardState { return r.hard }

// Term is the term of entry i, for i in [FirstIndex-1, LastIndex].
func (r *Replica) Term(i uint64) (term uint64, ok bool) {
	if i == r.trunc.Index {
		return r.trunc.Term, true
	}
	if i < r.trunc.Index || i > r.LastIndex() {
		return 0, false
	}
	k := sort.Search(len(r.runs), func(k int) bool { return r.runs[k].index > i })
	return r.runs[k-1].term, true
}

func (r *Replica) lastID() EntryID {
	last := r.LastIndex()
	term, _ := r.Term(last)
	return EntryID{last, term}
}

// Damaged tells why recovery found that the log cannot be trusted (L4), ""
// if it can. It stays so until the replica is removed.
func (r *Replica) Damaged() string { return r.damage }

// laidSection is the replica's line in a state table.
func (r *Replica) laidSection() *section {
	s := &section{key: r.key, hard: r.laid.hard, trunc: r.laid.trunc, last: r.laid.last.Index, prev: r.laid.last.Term}
	if r.damage != "" {
		s.flags = sectionDamaged
	}
	return s
}

func (r *Replica) slot(i uint64) *slot { return &r.slots[r.head+int(i-r.trunc.Index-1)] }

// Locate tells where the payload of entry i is, once the entry is durable.
// payloadBytes is 0 for an entry without payload; then loc means nothing.
func (r *Replica) Locate(i uint64) (loc Location, payloadBytes int, ok bool) {
	if i <= r.trunc.Index || i > r.durable || i > r.LastIndex() {
		return Location{}, 0, false
	}
	s := r.slot(i)
	return Location{s.segment, s.payload}, int(s.bytes), true
}

// cutFrom forgets all entries >= i and notes the claims that end with them.
func (r *Replica) cutFrom(i uint64, ends []claimEnd) []claimEnd {
	for j := i; j <= r.LastIndex(); j++ {
		ends = appendClaimEnd(ends, *r.slot(j))
	}
	r.slots = r.slots[:r.head+int(i-r.trunc.Index-1)]
	k := sort.Search(len(r.runs), func(k int) bool { return r.runs[k].index >= i })
	r.runs = r.runs[:k]
	r.durable = min(r.durable, i-1)
	return ends
}

// truncate forgets all entries <= t.Index. emptied tells whether the log did
// not hold t: then it forgot everything.
func (r *Replica) truncate(t EntryID, ends []claimEnd) (emptied bool, _ []claimEnd) {
	if t.Index < r.trunc.Index {
		panic(fmt.Sprintf("seglog: truncation of %v goes back from %d to %d", r.key, r.trunc.Index, t.Index))
	}
	if term, ok := r.Term(t.Index); !ok || term != t.Term {
		ends = r.cutFrom(r.trunc.Index+1, ends)
		r.slots, r.head, r.runs = nil, 0, nil
		r.trunc, r.durable = t, t.Index
		return true, ends
	}
	for j := r.trunc.Index + 1; j <= t.Index; j++ {
		ends = appendClaimEnd(ends, *r.slot(j))
	}
	r.head += int(t.Index - r.trunc.Index)
	r.trunc = t
	r.durable = max(r.durable, t.Index)
	if r.head > len(r.slots)/2 {
		r.slots = slices.Clone(r.slots[r.head:])
		r.head = 0
	}
	k := sort.Search(len(r.runs), func(k int) bool { return r.runs[k].index > t.Index })
	if k > 0 {
		k--
		r.runs[k].index = t.Index + 1
	}
	r.runs = slices.Delete(r.runs, 0, k)
	if len(r.slots) == r.head {
		r.runs = r.runs[:0]
	}
	return false, ends
}

// push adds an entry behind the last.
func (r *Replica) push(term uint64, s slot) {
	i := r.LastIndex() + 1
	r.slots = append(r.slots, s)
	if k := len(r.runs); k == 0 || r.runs[k-1].term != term {
		r.runs = append(r.runs, termRun{i, term})
	}
}

// Append queues w. done is called on the Loop, after the call, once w and all
// earlier writes of the replica are durable; an error is final for the whole
// disk (L8). Until then w's slices belong to the log; payloads it holds itself.
func (r *Replica) Append(w Write, done func(error)) {
	l := r.log
	if l.refused(done) {
		return
	}
	if err := r.check(&w); err != nil {
		panic(err)
	}
	q := &write{r: r, entries: w.Entries, done: done}
	l.mu.Lock()
	if w.Truncate != nil {
		q.trunc = *w.Truncate
		var emptied bool
		if emptied, q.ends = r.truncate(*w.Truncate, q.ends); emptied {
			q.flags |= sectionReset
		}
		q.hasTrunc = true
	}
	if len(w.Entries) > 0 && w.Entries[0].Index <= r.LastIndex() {
		q.ends = r.cutFrom(w.Entries[0].Index, q.ends)
	}
	if len(w.Entries) > 0 {
		q.prev, _ = r.Term(w.Entries[0].Index - 1)
	}
	l.w.seq++
	q.seq = l.w.seq
	for i := range w.Entries {
		e := &w.Entries[i]
		n := 0
		if e.Payload != nil {
			n = e.Payload.Retain().Len()
		}
		r.push(e.Term, pendingSlot(q.seq, n))
	}
	if w.HardState != nil {
		q.hard, q.hasHard = *w.HardState, true
		r.hard = q.hard
	}
	l.mu.Unlock()
	l.enqueue(q)
}

// check finds what the caller must never do.
func (r *Replica) check(w *Write) error {
	last := r.LastIndex()
	first := r.FirstIndex()
	if t := w.Truncate; t != nil {
		if term, ok := r.Term(t.Index); !ok || term != t.Term {
			last = t.Index
		}
		first = t.Index + 1
	}
	for i := range w.Entries {
		e := &w.Entries[i]
		switch {
		case i == 0 && (e.Index < first || e.Index > last+1), i > 0 && e.Index != w.Entries[i-1].Index+1:
			return fmt.Errorf("seglog: entry %d of %v appended to a log of %d..%d", e.Index, r.key, first, last)
		case len(e.Data) > MaxDataBytes || e.Payload != nil && e.Payload.Len() > block.MaxEntryBytes:
			return fmt.Errorf("seglog: entry %d of %v is too large", e.Index, r.key)
		}
		n := 0
		if e.Payload != nil {
			n = e.Payload.Len()
		}
		if int64(blocksOf(n)+blocksOf(len(e.Data)+entryBytes+sectionBytes+fixedBytes)) > r.log.largestBatch() {
			return fmt.Errorf("seglog: entry %d of %v does not fit a segment", e.Index, r.key)
		}
	}
	return nil
}
