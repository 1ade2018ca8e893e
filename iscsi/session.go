package iscsi

import (
	"context"
	"encoding/binary"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"firn.io/firn/iscsi/pdu"
	"firn.io/firn/iscsi/scsi"
)

// counters of one session.
type counters struct {
	commands, in, out, inline, conditions, aborted, rejected atomic.Uint64
}

func (c *counters) addTo(s *Stats) {
	s.Commands += c.commands.Load()
	s.InBytes += c.in.Load()
	s.OutBytes += c.out.Load()
	s.Inline += c.inline.Load()
	s.Conditions += c.conditions.Load()
	s.Aborted += c.aborted.Load()
	s.Rejected += c.rejected.Load()
}

// session is the full feature phase of a connection. The reader's goroutine
// owns what stands before mu.
type session struct {
	s         *Server
	c         *conn
	p         params
	discovery bool
	initiator string
	user      string
	isid      [6]byte
	tsih, cid uint16
	target    *Target
	nexus     *scsi.Nexus
	since     time.Time
	log       *slog.Logger
	count     counters
	// ctx ends when the connection has: reads give up then.
	ctx    context.Context
	cancel context.CancelFunc
	// ended is closed when no task can touch storage any more.
	ended chan struct{}
	// rest is what a text response has not told yet, textTag its tag.
	rest    []byte
	textTag uint32

	// expCmdSN is the next command's number, maxCmdSN the end of the window;
	// read by the sender, expCmdSN is written by the reader only.
	expCmdSN, maxCmdSN atomic.Uint32

	mu    sync.Mutex
	tasks map[uint32]*task
	// held are commands that came before their turn.
	held map[uint32]*task
	// r2ts are the outstanding requests for data, by target task tag.
	r2ts    map[uint32]*r2t
	lastTag uint32
	// ready wait for a worker, in order; workers is how many goroutines there
	// are, lazy how many of them wait.
	ready         []*task
	workers, lazy int
	wake          sync.Cond
	// ordered is how many of tasks are ORDERED.
	ordered int
	// bytes is what is charged, waiting the writes that wait for room.
	bytes    int64
	waiting  []*task
	closing  bool
	draining bool
	idle     []func() // called when tasks is empty
	over     sync.WaitGroup
}

// begin makes the session live: with its units attached, and known to its
// connection. The server's mu is held.
func (n *session) begin(l *login, first scsi.Code) {
	n.log = n.s.opt.Log.With("initiator", n.initiator, "address", n.c.nc.RemoteAddr())
	n.ctx, n.cancel = context.WithCancel(n.s.life)
	n.ended = make(chan struct{})
	n.tasks, n.held, n.r2ts = map[uint32]*task{}, map[uint32]*task{}, map[uint32]*r2t{}
	n.wake.L = &n.mu
	n.expCmdSN.Store(l.cmdSN)
	n.maxCmdSN.Store(l.cmdSN + uint32(n.s.opt.QueueDepth) - 1)
	if n.target != nil {
		n.log = n.log.With("target", n.target.Name)
		n.nexus = &scsi.Nexus{Initiator: scsi.PortName(n.initiator, n.isid), Port: n.s.opt.Tag, Group: n.s.opt.Tag, TargetName: n.target.Name, Tag: n.s.opt.Tag}
		for _, u := range n.target.LUNs {
			u.Unit.Attach(n.nexus, first)
		}
	}
	n.c.mu.Lock()
	n.c.session = n
	n.c.mu.Unlock()
}

func (n *session) info() SessionInfo {
	i := SessionInfo{TSIH: n.tsih, Initiator: n.initiator, Addr: n.c.nc.RemoteAddr().String(), Since: n.since, Commands: n.count.commands.Load()}
	if n.target != nil {
		i.Target = n.target.Name
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	i.InFlight = len(n.tasks)
	return i
}

// unit finds the unit that the 8 bytes of a LUN name.
func (n *session) unit(lun uint64) *scsi.Unit {
	number, ok := scsi.DecodeLUN(lun)
	if !ok {
		return nil
	}
	for _, l := range n.target.LUNs {
		if l.Number == number {
			return l.Unit
		}
	}
	return nil
}

// run reads requests until the connection ends. It returns nil after a logout.
func (n *session) run() (err error) {
	defer func() {
		// What an initiator sends must not end the process, whatever we forgot.
		if r := recover(); r != nil {
			err = fmt.Errorf("iscsi: panic: %v", r)
			n.log.Error("iscsi: a connection is ended by a bug", "panic", r)
		}
	}()
	c := n.c
	c.out.p = &n.p
	c.out.window = func() (uint32, uint32) { return n.expCmdSN.Load(), n.maxCmdSN.Load() }
	for {
		if err := c.next(n); err != nil {
			return err
		}
		if c.header.DataLen() > ourRecvSegment {
			return fmt.Errorf("iscsi: a %v with %d bytes of data, at most %d are allowed", c.header.Opcode(), c.header.DataLen(), ourRecvSegment)
		}
		done, err := n.request(&c.header)
		if done || err != nil {
			if ferr := c.out.flush(); err == nil {
				err = ferr
			}
			return err
		}
	}
}

// request takes one PDU. done says that the initiator has logged out.
func (n *session) request(h *pdu.Header) (done bool, err error) {
	op := h.Opcode()
	if n.discovery && op != pdu.Text && op != pdu.Logout && op != pdu.NopOut {
		return false, n.reject(rejectProtocol)
	}
	switch op {
	case pdu.Command:
		return false, n.command(h)
	case pdu.DataOut:
		return false, n.dataOut(h)
	case pdu.NopOut:
		return false, n.nopOut(h)
	case pdu.TaskMgmt:
		return false, n.taskMgmt(h)
	case pdu.Text:
		return false, n.textRequest(h)
	case pdu.Logout:
		return n.logout(h)
	case pdu.SNACK:
		return false, n.reject(rejectSNACK)
	}
	return false, n.reject(rejectUnsupported)
}

// turn judges the CmdSN of a request that is not a SCSI command; those that are
// not immediate come one after another. It is false if the request is ignored.
func (n *session) turn(h *pdu.Header) bool {
	if h.Immediate() {
		return true
	}
	sn := h.Word(pdu.AtCmdSN)
	if sn != n.expCmdSN.Load() {
		return false
	}
	n.expCmdSN.Store(sn + 1)
	n.maxCmdSN.Add(1) // it holds no place in the window
	n.advance()
	return true
}

// Reasons of Reject (11.17.1).
const (
	rejectSNACK       = 0x03
	rejectProtocol    = 0x04
	rejectUnsupported = 0x05
	rejectInvalid     = 0x09
)

// reject answers the current PDU with Reject, which carries its header.
func (n *session) reject(reason byte) error {
	n.count.rejected.Add(1)
	bad := n.c.header
	if err := n.c.data(n, nil); err != nil {
		return err
	}
	var h pdu.Header
	h.SetOpcode(pdu.Reject)
	h[1], h[2] = pdu.Final, reason
	h.SetWord(pdu.AtITT, pdu.NoTag)
	n.c.out.send(&h, bad[:], takesStatSN, nil)
	return nil
}

// ping asks whether the initiator is there.
func (n *session) ping() {
	var h pdu.Header
	h.SetOpcode(pdu.NopIn)
	h[1] = pdu.Final
	h.SetWord(pdu.AtITT, pdu.NoTag)
	h.SetWord(pdu.AtTTT, 1)
	n.c.out.send(&h, nil, hasStatSN, nil)
}

func (n *session) nopOut(h *pdu.Header) error {
	echo := make([]byte, min(h.DataLen(), n.p.sendSegment))
	itt, ttt, lun := h.ITT(), h.Word(pdu.AtTTT), h.LUN()
	if !n.turn(h) {
		return n.c.data(n, nil)
	}
	if err := n.c.data(n, echo); err != nil {
		return err
	}
	if itt == pdu.NoTag || ttt != pdu.NoTag { // an answer to a ping
		return nil
	}
	var r pdu.Header
	r.SetOpcode(pdu.NopIn)
	r[1] = pdu.Final
	r.SetLUN(lun)
	r.SetWord(pdu.AtITT, itt)
	r.SetWord(pdu.AtTTT, pdu.NoTag)
	n.c.out.send(&r, echo, takesStatSN|later, nil)
	return nil
}

// textRequest answers SendTargets; what does not fit one PDU is asked for by
// empty requests (11.10.4).
func (n *session) textRequest(h *pdu.Header) error {
	data := make([]byte, min(h.DataLen(), defaultSegment))
	flags, itt, ttt := h.Flags(), h.ITT(), h.Word(pdu.AtTTT)
	if h.DataLen() > defaultSegment || flags&pdu.Continue != 0 {
		return n.reject(rejectProtocol)
	}
	if !n.turn(h) {
		return n.c.data(n, nil)
	}
	if err := n.c.data(n, data); err != nil {
		return err
	}
	if ttt == pdu.NoTag {
		pairs, err := pdu.ParseText(data)
		if err != nil {
			return err
		}
		var out []pdu.Pair
		for _, p := range pairs {
			answer := []pdu.Pair{{Key: p.Key, Value: notUnderstood}}
			if p.Key == "SendTargets" {
				ctx, cancel := context.WithTimeout(n.ctx, n.s.opt.OpenTimeout)
				answer, err = n.s.sendTargets(ctx, n, p.Value)
				cancel()
				if err != nil {
					n.log.Warn("iscsi: discovery", "error", err)
					answer = nil
				}
			}
			out = append(out, answer...)
		}
		n.rest = encode(out)
		n.textTag++
		n.textTag &= 0x7fffffff
	} else if ttt != n.textTag || len(n.rest) == 0 {
		n.c.header.SetDataLen(0) // it has been read
		return n.reject(rejectInvalid)
	}
	var r pdu.Header
	r.SetOpcode(pdu.TextRsp)
	k := min(len(n.rest), n.p.sendSegment, defaultSegment)
	part := n.rest[:k]
	n.rest = n.rest[k:]
	r.SetWord(pdu.AtITT, itt)
	if len(n.rest) > 0 {
		r[1] = pdu.Continue
		r.SetWord(pdu.AtTTT, n.textTag)
	} else {
		r[1] = pdu.Final
		r.SetWord(pdu.AtTTT, pdu.NoTag)
	}
	n.c.out.send(&r, part, takesStatSN, nil)
	return nil
}

// logout answers when no task is left, so that what was answered is all there is.
func (n *session) logout(h *pdu.Header) (bool, error) {
	const closeSession, closeConnection = 0, 1
	const ok, noCID, noRecovery = 0, 1, 2
	itt, reason, cid := h.ITT(), h.Flags()&0x7f, uint16(h.Word(pdu.AtCID)>>16)
	turn := n.turn(h)
	if err := n.c.data(n, nil); err != nil {
		return false, err
	}
	if !turn {
		return false, nil
	}
	var r pdu.Header
	r.SetOpcode(pdu.LogoutRsp)
	r[1] = pdu.Final
	r.SetWord(pdu.AtITT, itt)
	switch {
	case reason == closeSession:
	case reason == closeConnection && cid == n.cid:
	case reason == closeConnection:
		r[2] = noCID
	default:
		r[2] = noRecovery
	}
	binary.BigEndian.PutUint16(r[40:], 2) // Time2Wait
	if r[2] != ok {
		n.c.out.send(&r, nil, takesStatSN, nil)
		return false, nil
	}
	n.quiesce(true)
	n.c.out.send(&r, nil, takesStatSN, nil)
	return true, nil
}

// end stops all that the session does and returns when none of its tasks can
// touch storage any more.
func (n *session) end() {
	n.c.nc.Close()
	n.quiesce(false)
	n.over.Wait()
	if n.target != nil {
		for _, u := range n.target.LUNs {
			u.Unit.Detach(n.nexus)
		}
		n.target.Close()
	}
	n.s.forget(n)
	n.cancel()
	close(n.ended)
}

// drain asks the initiator to log out, and ends the connection when nothing is
// in flight.
func (n *session) drain() {
	const asyncLogout = 1
	var h pdu.Header
	h.SetOpcode(pdu.Async)
	h[1] = pdu.Final
	h.SetWord(pdu.AtITT, pdu.NoTag)
	h[36] = asyncLogout
	binary.BigEndian.PutUint16(h[42:], 0)
	n.c.out.send(&h, nil, takesStatSN, nil)
	n.mu.Lock()
	defer n.mu.Unlock()
	n.draining = true
	n.whenIdle(n.c.interrupt)
}

// whenIdle calls f once no task is left; mu is held.
func (n *session) whenIdle(f func()) {
	if len(n.tasks) == 0 {
		f()
		return
	}
	n.idle = append(n.idle, f)
}
