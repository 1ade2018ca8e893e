package seglog

import "slices"

// What goes on when no segment is free for entries (S7): truncations, which are
// what frees some, and hard states, so that replicas vote and follow meanwhile.
// They have a segment of the reserve to themselves.

// nextUrgent returns a queued write that may be written now, nil if there is none.
func (l *Log) nextUrgent() *write {
	if i := l.nextHardState(); i >= 0 {
		return l.w.queue[i]
	}
	return l.nextTruncation()
}

// nextHardState is the place in the queue of a write without entries that no other
// one of its replica waits before: its hard state commits nothing that is not
// on the disk (L5). -1 if there is none.
func (l *Log) nextHardState() int {
	waiting := make(map[*Replica]bool)
	for i, q := range l.w.queue {
		if q.hasHard && q.flags == 0 && len(q.entries) == 0 && !q.early && !waiting[q.r] {
			return i
		}
		waiting[q.r] = true
	}
	return -1
}

// nextTruncation returns a queued write that does nothing but truncate and was
// not laid out early. It may overtake: what it forgets is on the disk, so no
// write that waits before it says anything of that; unless one of the same
// replica truncates, too, or begins or ends it.
func (l *Log) nextTruncation() *write {
	blocked := make(map[*Replica]bool)
	for _, q := range l.w.queue {
		switch {
		case q.hasTrunc && q.flags == 0 && len(q.entries) == 0 && !q.hasHard && !blocked[q.r]:
			if !q.early {
				return q
			}
		case q.hasTrunc || q.flags != 0:
			blocked[q.r] = true
		}
	}
	return nil
}

// layUrgent lays out hard states and truncations alone, ahead of the writes before
// them. Truncations stay queued, and are answered in their turn.
func (l *Log) layUrgent(s *segment) bool {
	if l.nextUrgent() == nil {
		return false
	}
	w := &l.w
	l.mu.Lock()
	defer l.mu.Unlock()
	e := newEncoder(w.buf)
	l.beginBatch(s, kindWrites, fresh)
	for i := l.nextHardState(); i >= 0 && fitting(w.queue[i], len(e.area), 0, l.room(s), 0) >= 0; i = l.nextHardState() {
		p := part{q: w.queue[i], final: true}
		l.laySection(&e, &p)
		w.round.parts = append(w.round.parts, p)
		w.queue = slices.Delete(w.queue, i, i+1)
	}
	for q := l.nextTruncation(); q != nil && fitting(q, len(e.area), 0, l.room(s), 0) >= 0; q = l.nextTruncation() {
		q.early = true
		p := part{q: q}
		l.laySection(&e, &p)
		w.round.parts = append(w.round.parts, p)
	}
	l.endBatch(&e)
	return true
}
