package iscsi

import (
	"sync/atomic"

	"firn.io/firn/iscsi/pdu"
	"firn.io/firn/iscsi/scsi"
)

// Task management functions (11.5.1) and responses (11.6.1).
const (
	tmfAbortTask    = 1
	tmfAbortTaskSet = 2
	tmfClearTaskSet = 4
	tmfUnitReset    = 5
	tmfWarmReset    = 6
	tmfColdReset    = 7
	tmfReassign     = 8

	tmfComplete     = 0
	tmfNoTask       = 1
	tmfNoUnit       = 2
	tmfNoReassign   = 4
	tmfNotSupported = 5
)

// taskMgmt takes a Task Management Request. It is answered when no task that it
// ends can touch storage any more, which may be after other requests.
func (n *session) taskMgmt(h *pdu.Header) error {
	function, itt, lun, ref := h.Flags()&0x7f, h.ITT(), h.LUN(), h.Word(pdu.AtRefTag)
	turn := n.turn(h)
	if err := n.c.data(n, nil); err != nil || !turn {
		return err
	}
	answer := func(response byte) {
		var r pdu.Header
		r.SetOpcode(pdu.TaskMgmtRsp)
		r[1], r[2] = pdu.Final, response
		r.SetWord(pdu.AtITT, itt)
		n.c.out.send(&r, nil, takesStatSN, nil)
	}
	unit := n.unit(lun)
	switch function {
	case tmfAbortTask:
		n.abortTask(ref, answer)
	case tmfAbortTaskSet, tmfClearTaskSet, tmfUnitReset:
		if unit == nil {
			answer(tmfNoUnit)
			return nil
		}
		n.abortUnit(function, unit, func() { answer(tmfComplete) })
	case tmfWarmReset, tmfColdReset:
		n.resetTarget(function == tmfColdReset, func() { answer(tmfComplete) })
	case tmfReassign:
		answer(tmfNoReassign)
	default:
		answer(tmfNotSupported)
	}
	return nil
}

func (n *session) abortTask(ref uint32, answer func(byte)) {
	n.mu.Lock()
	_, there := n.tasks[ref]
	n.mu.Unlock()
	if !there {
		answer(tmfNoTask)
		return
	}
	n.abort(func(t *task) bool { return t.itt == ref }, false, func() { answer(tmfComplete) })
}

// abortUnit ends tasks of a unit: this nexus' own, or all.
func (n *session) abortUnit(function byte, u *scsi.Unit, done func()) {
	sessions := []*session{n}
	if function != tmfAbortTaskSet {
		sessions = n.s.sharing(u)
	}
	n.abortIn(sessions, func(t *task) bool { return t.unit == u }, func() {
		switch function {
		case tmfClearTaskSet:
			u.Attention(n.nexus, scsi.AttentionCleared)
		case tmfUnitReset:
			u.Reset()
		}
		done()
	})
}

// abortIn ends tasks in several sessions; the others' initiators are told.
func (n *session) abortIn(sessions []*session, match func(*task) bool, done func()) {
	var left atomic.Int32
	left.Store(int32(len(sessions)) + 1)
	one := func() {
		if left.Add(-1) == 0 {
			done()
		}
	}
	for _, other := range sessions {
		other.abort(match, other != n, one)
	}
	one()
}

// resetTarget ends all tasks of this target's units; a cold one ends its
// sessions too.
func (n *session) resetTarget(cold bool, done func()) {
	units := map[*scsi.Unit]bool{}
	sessions := map[*session]bool{n: true}
	for _, l := range n.target.LUNs {
		units[l.Unit] = true
		for _, other := range n.s.sharing(l.Unit) {
			sessions[other] = true
		}
	}
	var list []*session
	for s := range sessions {
		list = append(list, s)
	}
	n.abortIn(list, func(t *task) bool { return units[t.unit] }, func() {
		for u := range units {
			u.Reset()
		}
		done()
		if cold {
			for _, s := range list {
				s.c.interrupt()
			}
		}
	})
}
