package iscsi

import (
	"context"
	"fmt"
	"sync"

	"firn.io/firn/iscsi/pdu"
	"firn.io/firn/iscsi/scsi"
)

// stage of a task.
type stage uint8

const (
	receiving stage = iota // its data is coming
	queued                 // it waits for a worker
	running                // it touches storage
	answering              // its answer is on its way
)

// task is a SCSI command from its arrival to its answer. The session's mu guards
// stage, aborted and what is about room and R2Ts; the reader owns what is about
// receiving.
type task struct {
	n         *session
	itt       uint32
	cmdSN     uint32
	lun       uint64
	unit      *scsi.Unit // nil: there is none
	flags     byte
	immediate bool
	edtl      uint32
	cdb       []byte
	room      [16]byte // for the cdb

	// buf holds the data of a write: need bytes once there is room for all. got
	// is how much came, in order; skipped what was sent beyond need.
	buf     []byte
	need    int
	got     int
	charged int64
	// unsolicited says that Data-Out comes by itself; dataSN is its next number.
	unsolicited bool
	sent        int // of unsolicited data, with what was skipped
	dataSN      uint32
	// asked is how far R2Ts reach, open how many are outstanding.
	asked, open int
	r2tSN       uint32
	// broken ends the task with this instead of running it.
	broken *scsi.Result

	ctx     context.Context
	cancel  context.CancelFunc
	stage   stage
	aborted bool
	// answerAbort says that the initiator is told TASK ABORTED.
	answerAbort bool
	gone        []func()
}

func (t *task) isOrdered() bool { return t.flags&pdu.AttrMask == pdu.AttrOrdered }

// r2t is an outstanding request for data.
type r2t struct {
	t      *task
	tag    uint32
	at     int
	end    int
	dataSN uint32
}

// bufferPool has the buffers of up to one entry; larger ones are made.
var bufferPool = sync.Pool{New: func() any { b := make([]byte, pooledBytes); return &b }}

const pooledBytes = 64 << 10

func getBuffer(n int) []byte {
	if n > pooledBytes {
		return make([]byte, n)
	}
	return (*bufferPool.Get().(*[]byte))[:n]
}

func putBuffer(b []byte) {
	if cap(b) == pooledBytes {
		b = b[:pooledBytes]
		bufferPool.Put(&b)
	}
}

// command takes a SCSI Command PDU.
func (n *session) command(h *pdu.Header) error {
	sn := h.Word(pdu.AtCmdSN)
	if !h.Immediate() {
		if d := int32(sn - n.expCmdSN.Load()); d < 0 || int32(sn-n.maxCmdSN.Load()) > 0 {
			return n.c.data(n, nil) // out of the window: ignored (4.2.2.1)
		}
	}
	cdb, err := pdu.ExtendCDB(h, n.c.ahs)
	if err != nil {
		return n.reject(rejectInvalid)
	}
	if n.fast(h, cdb) {
		return nil
	}
	t := &task{n: n, itt: h.ITT(), cmdSN: sn, lun: h.LUN(), unit: n.unit(h.LUN()), flags: h.Flags(), immediate: h.Immediate(), edtl: h.Word(pdu.AtEDTL)}
	t.cdb = append(t.room[:0], cdb...)
	if err := n.begins(t, h); err != nil {
		return err
	}
	return n.admit(t)
}

// fast answers a read that memory holds, without making a task of it.
func (n *session) fast(h *pdu.Header, cdb []byte) bool {
	const wants = pdu.Final | pdu.Read
	if !h.Has(wants) || h.Has(pdu.Write) || h.Immediate() || h.DataLen() != 0 || h.Word(pdu.AtCmdSN) != n.expCmdSN.Load() {
		return false
	}
	u := n.unit(h.LUN())
	if u == nil {
		return false
	}
	n.mu.Lock()
	blocked := n.ordered > 0 || n.draining || len(n.held) > 0 || h.Flags()&pdu.AttrMask == pdu.AttrOrdered
	n.mu.Unlock()
	if blocked {
		return false
	}
	loan, ok := u.Memory(cdb)
	if !ok {
		return false
	}
	p := loan.Bytes()
	if len(p) != int(h.Word(pdu.AtEDTL)) || len(p) > min(n.p.sendSegment, n.p.maxBurst) {
		loan.Release()
		return false
	}
	n.expCmdSN.Add(1)
	n.maxCmdSN.Add(1)
	n.count.commands.Add(1)
	n.count.inline.Add(1)
	n.count.in.Add(uint64(len(p)))
	r := &n.c.out.scratch
	*r = pdu.Header{}
	r.SetOpcode(pdu.DataIn)
	r[1] = pdu.Final | pdu.DataStatus
	r.SetWord(pdu.AtITT, h.ITT())
	r.SetWord(pdu.AtTTT, pdu.NoTag)
	if len(p) < copyBelow {
		n.c.out.send(r, p, takesStatSN|later, nil)
		loan.Release()
	} else {
		n.c.out.send(r, p, takesStatSN|later, loan.Release)
	}
	return true
}

// begins reads the immediate data of a command and learns what else comes.
func (n *session) begins(t *task, h *pdu.Header) error {
	immediate := h.DataLen()
	if t.flags&pdu.Write == 0 {
		return n.c.data(n, nil)
	}
	if t.unit != nil {
		t.need = int(min(int64(t.edtl), t.unit.DataOut(t.cdb)))
	}
	t.unsolicited = t.flags&pdu.Final == 0
	if t.unsolicited && n.p.initialR2T || immediate > int(t.edtl) || immediate > n.p.firstBurst || immediate > 0 && !n.p.immediate {
		return fmt.Errorf("iscsi: a command with %d bytes of immediate data breaks what was agreed on", immediate)
	}
	first := min(t.need, immediate)
	if t.unsolicited {
		first = min(t.need, n.p.firstBurst)
	}
	n.mu.Lock()
	if n.bytes+int64(t.need) <= n.s.opt.SessionBytes || t.need <= first {
		// What comes unasked has to be taken in any case.
		if t.need > first {
			t.charged = int64(t.need)
			n.bytes += t.charged
		}
		first = t.need
	}
	n.mu.Unlock()
	t.buf = getBuffer(first)
	t.got = min(immediate, t.need)
	t.sent = immediate
	return n.c.data(n, t.buf[:t.got])
}

// admit puts the task in its turn: now, or when the numbers before its own came.
func (n *session) admit(t *task) error {
	n.mu.Lock()
	if t.flags&pdu.Read != 0 && t.flags&pdu.Write != 0 {
		t.broken = &scsi.Result{Status: scsi.CheckCondition, Sense: scsi.InvalidOpcode()}
	}
	if u := n.tasks[t.itt]; u != nil && u.stage != answering || t.itt == pdu.NoTag {
		n.mu.Unlock()
		return fmt.Errorf("iscsi: task tag %#x is in use", t.itt)
	}
	if t.immediate && len(n.tasks) >= 2*n.s.opt.QueueDepth {
		n.mu.Unlock()
		return fmt.Errorf("iscsi: more than %d commands at once", 2*n.s.opt.QueueDepth)
	}
	t.ctx, t.cancel = context.WithCancel(n.ctx)
	n.tasks[t.itt] = t
	if t.isOrdered() {
		n.ordered++
	}
	n.count.commands.Add(1)
	if n.draining && t.broken == nil {
		t.broken = &scsi.Result{Status: scsi.Busy}
	}
	if t.immediate {
		n.mu.Unlock()
		n.proceed(t)
		return nil
	}
	n.held[t.cmdSN] = t
	n.mu.Unlock()
	n.advance()
	return nil
}

// advance lets the commands go on whose turn it is.
func (n *session) advance() {
	for {
		n.mu.Lock()
		sn := n.expCmdSN.Load()
		t := n.held[sn]
		delete(n.held, sn)
		n.mu.Unlock()
		if t == nil {
			return
		}
		n.expCmdSN.Store(sn + 1)
		n.proceed(t)
	}
}

// proceed asks for data, or queues the task if it has all of it.
func (n *session) proceed(t *task) {
	switch {
	case t.broken != nil:
		n.queue(t)
	case t.unsolicited: // until its last Data-Out
	case t.got >= t.need:
		n.queue(t)
	default:
		n.solicit(t)
	}
}

// solicit sends the R2Ts that a task may have outstanding. A task that there is
// no room for waits until others have ended.
func (n *session) solicit(t *task) {
	var requests [ourOutstanding]pdu.Header
	k := 0
	n.mu.Lock()
	if t.aborted || !n.makeRoom(t) {
		n.mu.Unlock()
		return
	}
	t.asked = max(t.asked, t.got)
	for t.asked < t.need && t.open < n.p.outstanding {
		n.lastTag = (n.lastTag + 1) & 0x7fffffff
		r := &r2t{t: t, tag: n.lastTag, at: t.asked, end: min(t.need, t.asked+n.p.maxBurst)}
		n.r2ts[r.tag] = r
		t.asked = r.end
		t.open++
		h := &requests[k]
		k++
		h.SetOpcode(pdu.R2T)
		h[1] = pdu.Final
		h.SetLUN(t.lun)
		h.SetWord(pdu.AtITT, t.itt)
		h.SetWord(pdu.AtTTT, r.tag)
		h.SetWord(pdu.AtDataSN, t.r2tSN)
		h.SetWord(pdu.AtBufferOffset, uint32(r.at))
		h.SetWord(pdu.AtDesiredLen, uint32(r.end-r.at))
		t.r2tSN++
	}
	n.mu.Unlock()
	for i := range k {
		n.c.out.send(&requests[i], nil, hasStatSN, nil)
	}
}

// makeRoom gives the task its whole buffer, or makes it wait; mu is held. One
// task always gets room.
func (n *session) makeRoom(t *task) bool {
	if len(t.buf) >= t.need {
		return true
	}
	if n.bytes > 0 && n.bytes+int64(t.need) > n.s.opt.SessionBytes {
		n.waiting = append(n.waiting, t)
		return false
	}
	t.charged = int64(t.need)
	n.bytes += t.charged
	buf := getBuffer(t.need)
	copy(buf, t.buf[:t.got])
	putBuffer(t.buf)
	t.buf = buf
	return true
}

// uncharge gives back room and lets the next one have it. It may be called by
// any goroutine that holds no lock.
func (n *session) uncharge(bytes int64) {
	if bytes == 0 {
		return
	}
	n.mu.Lock()
	n.bytes -= bytes
	var next *task
	if len(n.waiting) > 0 && (n.bytes == 0 || n.bytes+int64(n.waiting[0].need) <= n.s.opt.SessionBytes) {
		next = n.waiting[0]
		n.waiting = n.waiting[1:]
	}
	n.wake.Broadcast()
	n.mu.Unlock()
	if next != nil {
		n.solicit(next)
	}
}

// dataOut takes a Data-Out PDU. One that belongs to no task any more is read
// and forgotten.
func (n *session) dataOut(h *pdu.Header) error {
	n.count.out.Add(uint64(h.DataLen()))
	ttt := h.Word(pdu.AtTTT)
	n.mu.Lock()
	r, t := n.r2ts[ttt], n.tasks[h.ITT()]
	n.mu.Unlock()
	if ttt != pdu.NoTag {
		if r == nil || r.t.itt != h.ITT() {
			return n.c.data(n, nil)
		}
		return n.solicited(r, h)
	}
	if t == nil || !t.unsolicited {
		return n.c.data(n, nil)
	}
	at, size := int(h.Word(pdu.AtBufferOffset)), h.DataLen()
	if h.Word(pdu.AtDataSN) != t.dataSN || at != t.sent || at+size > min(int(t.edtl), n.p.firstBurst) {
		return n.breakOff(t)
	}
	t.dataSN++
	t.sent += size
	from, to := min(at, t.need), min(at+size, t.need)
	if err := n.c.data(n, t.buf[from:to]); err != nil {
		return err
	}
	t.got = to
	if !h.Has(pdu.Final) {
		return nil
	}
	t.unsolicited = false
	n.mu.Lock()
	held := !t.immediate && n.held[t.cmdSN] == t
	n.mu.Unlock()
	if !held {
		n.proceed(t)
	}
	return nil
}

func (n *session) solicited(r *r2t, h *pdu.Header) error {
	t, size := r.t, h.DataLen()
	if h.Word(pdu.AtDataSN) != r.dataSN || int(h.Word(pdu.AtBufferOffset)) != r.at || size > r.end-r.at || r.at != t.got || h.Has(pdu.Final) != (r.at+size == r.end) {
		return n.breakOff(t)
	}
	if err := n.c.data(n, t.buf[r.at:r.at+size]); err != nil {
		return err
	}
	r.dataSN++
	r.at += size
	t.got += size
	if !h.Has(pdu.Final) {
		return nil
	}
	n.mu.Lock()
	delete(n.r2ts, r.tag)
	t.open--
	n.mu.Unlock()
	if t.got == t.need {
		n.queue(t)
	} else {
		n.solicit(t)
	}
	return nil
}

// breakOff ends a task whose data is not what was agreed on.
func (n *session) breakOff(t *task) error {
	if err := n.c.data(n, nil); err != nil {
		return err
	}
	t.unsolicited = false
	t.broken = &scsi.Result{Status: scsi.CheckCondition, Sense: scsi.DataPhaseError()}
	n.mu.Lock()
	n.forgetR2Ts(t)
	n.mu.Unlock()
	n.queue(t)
	return nil
}

// forgetR2Ts is called with mu held.
func (n *session) forgetR2Ts(t *task) {
	for tag, r := range n.r2ts {
		if r.t == t {
			delete(n.r2ts, tag)
		}
	}
}
