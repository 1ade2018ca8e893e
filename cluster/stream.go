package cluster

import (
	"firn.io/firn/cluster/wire"
	"firn.io/firn/internal/block"
)

// stream numbers the content operations of one (volume, group, epoch) by W3.
//
// Invariants:
//   - Every operation that was sent under this epoch and has no definite answer
//     is in pending, in order of opSeq. floor is the lowest opSeq without one.
//   - No opSeq at or above floor + wire.OpWindow is given out.
//   - An operation keeps its opSeq and its floor for all attempts under one epoch.
//   - token never falls while the attachment lasts: neither does what reads see.
type stream struct {
	att   *Attachment
	group *group

	token block.Version

	next  block.OpSeq // to be given out
	floor block.OpSeq
	ended [wire.OpWindow / 64]uint64 // bit opSeq mod wire.OpWindow: ended, above floor

	head, tail *operation   // pending
	waiting    []*operation // for room in the window, or for a new epoch
}

func newStream(a *Attachment, g *group) *stream {
	return &stream{att: a, group: g, next: 1, floor: 1}
}

func (s *stream) raise(v block.Version) {
	s.token = max(s.token, v)
}

// begin takes a content operation with all but its numbers set.
func (s *stream) begin(op *operation) {
	op.stream, op.group = s, s.group
	if s.att.paused || len(s.waiting) > 0 || s.next >= s.floor+wire.OpWindow {
		s.waiting = append(s.waiting, op)
		return
	}
	s.link(op)
	s.issue(op)
}

func (s *stream) link(op *operation) {
	op.prev, op.next = s.tail, nil
	if s.tail != nil {
		s.tail.next = op
	} else {
		s.head = op
	}
	s.tail = op
}

func (s *stream) unlink(op *operation) {
	if op.prev != nil {
		op.prev.next = op.next
	} else {
		s.head = op.next
	}
	if op.next != nil {
		op.next.prev = op.prev
	} else {
		s.tail = op.prev
	}
	op.prev, op.next = nil, nil
}

// issue numbers op under the current epoch and sends it for the first time.
func (s *stream) issue(op *operation) {
	c := &op.req.Command
	c.Epoch, c.Nonce, c.Layout = s.att.owner.Epoch, s.att.owner.Nonce, s.att.vol.Layout
	c.OpSeq, c.Floor = s.next, s.floor
	s.next++
	s.group.submit(op)
}

// settle notes that op has its definite answer.
func (s *stream) settle(op *operation) {
	s.unlink(op)
	seq := op.req.Command.OpSeq
	s.ended[seq%wire.OpWindow/64] |= 1 << (seq % 64)
	for s.floor < s.next {
		word, bit := &s.ended[s.floor%wire.OpWindow/64], uint64(1)<<(s.floor%64)
		if *word&bit == 0 {
			break
		}
		*word &^= bit
		s.floor++
	}
	s.drain()
}

// drain starts what waited, as far as there is room.
func (s *stream) drain() {
	for len(s.waiting) > 0 && !s.att.paused && s.next < s.floor+wire.OpWindow {
		op := s.waiting[0]
		s.waiting[0] = nil
		s.waiting = s.waiting[1:]
		s.link(op)
		s.issue(op)
	}
}

// withdraw stops all attempts of what is pending.
func (s *stream) withdraw() {
	for op := s.head; op != nil; op = op.next {
		op.withdraw()
	}
}

// reissue sends all that is pending anew, in order, under an epoch that was
// installed since (W4). The group's window was reset by the Fence.
func (s *stream) reissue() {
	s.next, s.floor = 1, 1
	clear(s.ended[:])
	for op := s.head; op != nil; op = op.next {
		op.attempted, op.reported = false, false
		s.issue(op)
	}
	s.drain()
}

// abort ends everything with err: the attachment is over.
func (s *stream) abort(err error) {
	s.withdraw()
	var ops []*operation
	for op := s.head; op != nil; op = op.next {
		ops = append(ops, op)
	}
	s.head, s.tail = nil, nil
	ops = append(ops, s.waiting...)
	s.waiting = nil
	for _, op := range ops {
		op.stream = nil
		op.finish(nil, err)
	}
}
