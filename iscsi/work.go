package iscsi

import (
	"encoding/binary"
	"slices"

	"firn.io/firn/iscsi/pdu"
	"firn.io/firn/iscsi/scsi"
)

// queue hands a task to the workers: it has all of its data.
func (n *session) queue(t *task) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if t.aborted || t.stage != receiving {
		return
	}
	t.stage = queued
	if t.flags&pdu.AttrMask == pdu.AttrHead {
		n.ready = slices.Insert(n.ready, 0, t)
	} else {
		n.ready = append(n.ready, t)
	}
	if n.lazy == 0 && n.workers < workersPerQueue {
		n.workers++
		n.over.Add(1)
		go n.work()
		return
	}
	n.wake.Signal()
}

// work is the life of a worker.
func (n *session) work() {
	defer n.over.Done()
	for {
		n.mu.Lock()
		t := n.take()
		for t == nil && !n.closing {
			n.lazy++
			n.wake.Wait()
			n.lazy--
			t = n.take()
		}
		if t == nil {
			n.mu.Unlock()
			return
		}
		t.stage = running
		n.mu.Unlock()
		n.execute(t)
	}
}

// take removes the first task that may start; mu is held.
func (n *session) take() *task {
	for i, t := range n.ready {
		if n.mayStart(t) {
			n.ready = slices.Delete(n.ready, i, i+1)
			return t
		}
	}
	return nil
}

// mayStart keeps the order that ORDERED tasks ask for: after all before, before
// all after them (SAM-5, 8.9).
func (n *session) mayStart(t *task) bool {
	if n.ordered == 0 || t.flags&pdu.AttrMask == pdu.AttrHead {
		return true
	}
	for _, u := range n.tasks {
		if u != t && int32(u.cmdSN-t.cmdSN) < 0 && (t.isOrdered() || u.isOrdered()) {
			return false
		}
	}
	return true
}

// execute runs a task and answers it.
func (n *session) execute(t *task) {
	var in []byte
	charged := int64(0)
	var r scsi.Result
	switch {
	case t.broken != nil:
		r = *t.broken
	case t.unit == nil:
		r = scsi.NoUnit(t.cdb, n.luns(), t.limit())
	case scsi.IsReportLUNs(t.cdb):
		r = scsi.ReportLUNs(t.cdb, n.luns(), t.limit())
	default:
		if k := min(t.unit.DataIn(t.cdb), t.limit()); k > 0 {
			charged = n.charge(k)
			in = getBuffer(int(k))
		}
		q := scsi.Request{CDB: t.cdb, Out: t.buf[:t.got], In: in, Limit: t.limit()}
		if t.flags&pdu.Write != 0 {
			q.Offered = int64(t.edtl)
		}
		r = t.unit.Do(t.ctx, n.nexus, q)
	}
	t.cancel()
	if t.buf != nil {
		putBuffer(t.buf)
		t.buf = nil
	}
	n.uncharge(t.charged)
	n.finish(t, &r, in, charged)
}

// limit is how many bytes the initiator takes.
func (t *task) limit() int64 {
	if t.flags&pdu.Read == 0 {
		return 0
	}
	return int64(t.edtl)
}

// charge waits until a read has room; one always has.
func (n *session) charge(bytes int64) int64 {
	n.mu.Lock()
	defer n.mu.Unlock()
	for n.bytes > 0 && n.bytes+bytes > n.s.opt.SessionBytes && !n.closing {
		n.wake.Wait()
	}
	n.bytes += bytes
	return bytes
}

func (n *session) luns() []uint16 {
	out := make([]uint16, len(n.target.LUNs))
	for i, l := range n.target.LUNs {
		out[i] = l.Number
	}
	return out
}

// finish answers a task that has run, unless it was aborted meanwhile, and
// forgets it. in is the buffer that r.In may be part of.
func (n *session) finish(t *task, r *scsi.Result, in []byte, charged int64) {
	n.mu.Lock()
	if t.aborted {
		n.mu.Unlock()
		putBuffer(in)
		n.uncharge(charged)
		n.leave(t)
		return
	}
	t.stage = answering
	n.mu.Unlock()
	if !t.immediate {
		n.maxCmdSN.Add(1)
	}
	n.count.in.Add(uint64(len(r.In)))
	if r.Status != scsi.Good {
		n.count.conditions.Add(1)
	}
	n.respond(t, r, func() {
		putBuffer(in)
		n.uncharge(charged)
	})
	n.leave(t)
}

// residual sets the residual of a response (11.4.5).
func (t *task) residual(h *pdu.Header, r *scsi.Result) {
	moved := r.Wanted
	if t.flags&(pdu.Read|pdu.Write) == 0 && moved == 0 {
		return
	}
	if t.flags&pdu.Read != 0 && r.Status != scsi.Good {
		moved = int64(len(r.In))
	}
	switch edtl := int64(t.edtl); {
	case moved > edtl:
		h[1] |= pdu.Overflow
		h.SetWord(pdu.AtResidual, uint32(min(moved-edtl, 1<<32-1)))
	case moved < edtl:
		h[1] |= pdu.Underflow
		h.SetWord(pdu.AtResidual, uint32(edtl-moved))
	}
}

// respond sends data and status of a task. done is called once r.In is not
// needed any more.
func (n *session) respond(t *task, r *scsi.Result, done func()) {
	out := n.c.out
	in, sn := r.In, uint32(0)
	collapse := r.Status == scsi.Good && len(in) > 0
	for at := 0; at < len(in); sn++ {
		burstEnd := (at/n.p.maxBurst + 1) * n.p.maxBurst
		k := min(len(in)-at, n.p.sendSegment, burstEnd-at)
		var h pdu.Header
		h.SetOpcode(pdu.DataIn)
		h.SetLUN(0)
		h.SetWord(pdu.AtITT, t.itt)
		h.SetWord(pdu.AtTTT, pdu.NoTag)
		h.SetWord(pdu.AtDataSN, sn)
		h.SetWord(pdu.AtBufferOffset, uint32(at))
		last := at+k == len(in)
		if last || at+k == burstEnd {
			h[1] |= pdu.Final
		}
		f := later
		var sent func()
		if last {
			sent = done
			if collapse {
				h[1] |= pdu.DataStatus
				h[3] = byte(r.Status)
				t.residual(&h, r)
				f = takesStatSN
			}
		}
		out.send(&h, in[at:at+k], f, sent)
		at += k
	}
	if collapse {
		return
	}
	if len(in) == 0 {
		defer done()
	}
	var h pdu.Header
	h.SetOpcode(pdu.Response)
	h[1], h[3] = pdu.Final, byte(r.Status)
	h.SetWord(pdu.AtITT, t.itt)
	h.SetWord(pdu.AtDataSN, sn+t.r2tSN)
	t.residual(&h, r)
	var data []byte
	if len(r.Sense) > 0 {
		data = append(binary.BigEndian.AppendUint16(make([]byte, 0, 2+scsi.SenseLen), uint16(len(r.Sense))), r.Sense...)
	}
	out.send(&h, data, takesStatSN, nil)
}

// leave forgets a task that is over.
func (n *session) leave(t *task) {
	n.mu.Lock()
	// The initiator may have used the tag again since it was answered.
	if n.tasks[t.itt] == t {
		delete(n.tasks, t.itt)
	}
	if t.isOrdered() {
		n.ordered--
		n.wake.Broadcast()
	}
	gone := t.gone
	t.gone = nil
	if len(n.tasks) == 0 {
		gone = append(gone, n.idle...)
		n.idle = nil
	}
	tell := t.aborted && t.answerAbort
	n.mu.Unlock()
	if tell {
		n.respond(t, &scsi.Result{Status: scsi.TaskAborted}, func() {})
	}
	for _, f := range gone {
		f()
	}
}

// abort ends the tasks that match: those that do not run yet at once, the others
// as soon as they do not touch storage any more. Then done is called. tell says
// that the initiator is told TASK ABORTED for each.
func (n *session) abort(match func(*task) bool, tell bool, done func()) {
	n.mu.Lock()
	var over []*task
	left := 1
	finished := func() {
		n.mu.Lock()
		left--
		last := left == 0
		n.mu.Unlock()
		if last {
			done()
		}
	}
	for _, t := range n.tasks {
		if !match(t) {
			continue
		}
		left++
		t.gone = append(t.gone, finished)
		if t.stage == answering || t.aborted {
			continue
		}
		t.aborted, t.answerAbort = true, tell
		n.count.aborted.Add(1)
		if t.stage == running {
			t.cancel()
			continue
		}
		over = append(over, n.drop(t))
	}
	n.mu.Unlock()
	for _, t := range over {
		t.cancel()
		n.uncharge(t.charged)
		n.leave(t)
	}
	finished()
}

// drop takes a task that does not run out of all lists but tasks, and held: its
// number still has its turn. mu is held. Its buffer is left to the garbage
// collector, for the reader may be filling it.
func (n *session) drop(t *task) *task {
	n.forgetR2Ts(t)
	n.ready = slices.DeleteFunc(n.ready, func(u *task) bool { return u == t })
	n.waiting = slices.DeleteFunc(n.waiting, func(u *task) bool { return u == t })
	if !t.immediate {
		n.maxCmdSN.Add(1)
	}
	return t
}

// quiesce ends the tasks that wait for data, and all if answer is not set, and
// returns when no task is left. The reader's goroutine calls it.
func (n *session) quiesce(answer bool) {
	over := make(chan struct{})
	n.abort(func(t *task) bool { return !answer || t.stage == receiving }, false, func() {
		n.mu.Lock()
		idle := len(n.tasks) == 0
		if !idle {
			n.idle = append(n.idle, func() { close(over) })
		}
		n.mu.Unlock()
		if idle {
			close(over)
		}
	})
	<-over
	if answer {
		return
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.closing = true
	n.wake.Broadcast()
}
