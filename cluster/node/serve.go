package node

import (
	"time"

	"firn.io/firn/cluster/transport"
	"firn.io/firn/cluster/wire"
	"firn.io/firn/internal/block"
	"firn.io/firn/internal/payload"
)

// Limits of what a node holds for its clients at once. What comes on top is
// refused with StatusBusy before anything was done.
const (
	// maxReads bounds reads, maps and record requests that have not been answered.
	maxReads = 4096
	// maxReadBytes bounds the bytes that they asked for.
	maxReadBytes = 64 << 20
)

// Receive implements transport.Handler for accepted connections, and takes what
// dialled ones answer.
func (n *Node) Receive(p transport.Peer, m transport.Message) {
	if n.stopped {
		m.Release()
		return
	}
	switch m.Type {
	case transport.TypeRaft, transport.TypeHeartbeat:
		n.host.Receive(n.senders[p], m)
	case transport.TypeRequest:
		n.request(p, m)
	case transport.TypeHello:
		h, err := transport.DecodeHello(m.Header)
		m.Release()
		if err == nil && h.Node != 0 {
			n.senders[p] = h.Node
		}
	case transport.TypeCopy:
		n.views.request(p, m.Header)
		m.Release()
	case transport.TypeCopied:
		n.installs.answered(m)
	case transport.TypeSpace:
		n.space.receive(m.Header)
		m.Release()
	default:
		n.counters.BadMessages++
		m.Release()
	}
}

// Closed implements transport.Handler: answers to a peer that is gone go
// nowhere, and what it proposed takes its course.
func (n *Node) Closed(p transport.Peer, _ error) { delete(n.senders, p) }

// op is one request on its way to its answer.
type op struct {
	node *Node
	peer transport.Peer
	req  *wire.Request
	rep  *replica
	read bool // counted in node.reads
}

func (n *Node) request(p transport.Peer, m transport.Message) {
	q := new(wire.Request)
	if err := wire.DecodeRequest(m.Header, q); err != nil {
		m.Release()
		n.counters.BadMessages++
		o := &op{node: n, peer: p, req: q}
		o.refuse(wire.StatusInvalid, err.Error())
		return
	}
	if q.Kind == wire.ReqHealth {
		m.Release()
		h := n.health()
		resp := wire.Response{Status: wire.StatusOK, Health: wire.AppendHealth(nil, &h)}
		(&op{node: n, peer: p, req: q}).answer(&resp, nil)
		return
	}
	o := &op{node: n, peer: p, req: q, rep: n.replicas[q.Group]}
	if !n.admit(o) {
		m.Release()
		return
	}
	if q.Kind == wire.ReqPropose {
		n.propose(o, m)
		return
	}
	m.Release()
	if !n.beginRead(o) {
		o.refuse(wire.StatusBusy, "")
		return
	}
	if q.LeaderOnly || q.Kind == wire.ReqRecord {
		o.viaLeader()
		return
	}
	o.rep.whenApplied(q.Token, o, o.serve)
}

// admit checks what every request needs: a replica that is open here, and a
// layout that is not older than the one the group knows of.
func (n *Node) admit(o *op) bool {
	switch {
	case o.rep == nil:
		o.refuse(wire.StatusUnknownGroup, "")
	case o.rep.group == nil:
		o.refuse(wire.StatusNotReady, "")
	case o.rep.group.Err() != nil:
		o.refuse(wire.StatusNotReady, o.rep.group.Err().Error())
	default:
		volume := o.req.Volume
		if o.req.Kind == wire.ReqPropose {
			volume = o.req.Command.Volume
		}
		newest := o.rep.layout(volume)
		if o.req.Layout >= newest {
			return true
		}
		resp := wire.Response{Status: wire.StatusStaleLayout, NewLayout: newest}
		o.answer(&resp, nil)
	}
	return false
}

func (n *Node) propose(o *op, m transport.Message) {
	cmd, g := &o.req.Command, o.rep.group
	var p *payload.Buf
	want := 0
	if cmd.Type == wire.CmdWrite {
		want = int(cmd.PayloadBytes)
	}
	if len(m.Payloads) == 1 {
		p = m.Payloads[0]
	}
	switch {
	case cmd.Cluster != n.cfg.Cluster:
		o.refuse(wire.StatusInvalid, "the command is of another cluster")
	case len(m.Payloads) > 1, (p != nil) != (want > 0), p != nil && p.Len() != want:
		o.refuse(wire.StatusInvalid, "the payload is not what the command says")
	case !g.Leading():
		o.refuse(wire.StatusNotLeader, "")
	case p != nil && block.FirstBadCRC(cmd.CRCs, p.Bytes()) >= 0:
		o.refuse(wire.StatusCorrupt, "the payload does not match its checksums")
	default:
		st := wire.Status(0)
		if p != nil {
			st = n.space.refusal(o.rep)
		}
		if st == 0 {
			n.replicate(o, p)
			return
		}
		if st == wire.StatusNoSpace {
			n.counters.NoSpace++
		}
		o.refuse(st, "")
	}
	m.Release()
}

// replicate proposes an admitted command. A write counts against the room of its
// disks meanwhile, and waits first when there is little left.
func (n *Node) replicate(o *op, p *payload.Buf) {
	cmd, bytes := &o.req.Command, 0
	var disks []block.DiskID
	var wait time.Duration
	if p != nil {
		bytes = p.Len()
		wait = n.space.delay(o.rep)
		if wait > 0 && n.space.delayed+int64(bytes) > maxDelayedBytes {
			p.Release()
			o.refuse(wire.StatusBusy, "")
			return
		}
		disks = n.space.began(o.rep, bytes)
	}
	propose := func() {
		if o.rep.group == nil { // its disk failed while the write waited
			n.space.ended(disks, bytes)
			p.Release()
			o.refuse(wire.StatusNotReady, "")
			return
		}
		o.rep.group.Propose(cmd, p, func(res wire.ApplyResult, st wire.Status) {
			n.space.ended(disks, bytes)
			resp := wire.Response{Status: st, Result: res}
			o.answer(&resp, nil)
		})
	}
	if wait > 0 {
		n.space.delayed += int64(bytes)
		n.loop.After(wait, func() {
			n.space.delayed -= int64(bytes)
			propose()
		})
		return
	}
	propose()
}

// refuse answers with a status alone.
func (o *op) refuse(st wire.Status, text string) {
	resp := wire.Response{Status: st, Text: text}
	o.answer(&resp, nil)
}

// answer completes resp and sends it. It takes over the holds of bufs.
func (o *op) answer(resp *wire.Response, bufs []*payload.Buf) {
	n := o.node
	if o.read {
		n.endRead(o)
	}
	resp.ID, resp.Group = o.req.ID, o.req.Group
	if o.rep != nil && o.rep.group != nil {
		if leader, _, ok := o.rep.group.Leader(); ok {
			resp.Leader = leader
		}
		if o.req.Kind == wire.ReqPropose {
			resp.Applied = o.rep.version(o.rep.group.Applied().Index)
		}
	}
	n.counters.answered(o.req.Kind, resp.Status)
	m := transport.Message{Type: transport.TypeResponse, Header: wire.AppendResponse(nil, resp), Payloads: bufs}
	if !o.peer.Send(transport.Data, m) {
		n.counters.Unsent++
	}
}

func (n *Node) beginRead(o *op) bool {
	bytes := int64(o.req.Count) * block.Size
	if n.reads >= maxReads || n.reads > 0 && n.readBytes+bytes > maxReadBytes {
		return false
	}
	n.reads++
	n.readBytes += bytes
	o.read = true
	return true
}

func (n *Node) endRead(o *op) {
	n.reads--
	n.readBytes -= int64(o.req.Count) * block.Size
	o.read = false
}
