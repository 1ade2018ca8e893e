package node

import (
	"time"

	"firn.io/firn/cluster/index"
	"firn.io/firn/cluster/seglog"
	"firn.io/firn/cluster/transport"
	"firn.io/firn/cluster/wire"
	"firn.io/firn/internal/block"
	"firn.io/firn/internal/clock"
	"firn.io/firn/internal/payload"
)

// Limits of what a node gives to replicas that are behind (C3).
const (
	// maxViews bounds the views that are open at once.
	maxViews = 4
	// maxViewAsks bounds the unanswered questions of one view.
	maxViewAsks = 16
	// viewIdle ends a view that nobody has asked anything of for so long.
	viewIdle = 15 * time.Second
	// viewAge ends any view: it keeps the store, and every segment of its disk
	// that has become free since, from being used again.
	viewAge = 10 * time.Minute
	// viewShort is the age from which on a view ends when its disk is short of
	// segments. What its reader has by then it keeps.
	viewShort = 5 * time.Second
)

// views are the views of this node's replicas that others read.
type views struct {
	node  *Node
	open  map[uint64]*view
	begun int // views that wait for their checkpoint
	last  uint64
	next  clock.Instant // when the next byte may be sent
}

// view is one replica's state at one index, pinned for one reader.
type view struct {
	id          uint64
	rep         *replica
	state       *index.View
	unpin       func()
	since, used clock.Instant
	asks        int // being answered
	paced       int // waiting for their turn; they hold nothing
	gone        bool
}

func newViews(n *Node) *views { return &views{node: n, open: make(map[uint64]*view)} }

// request answers a question of a replica on another node.
func (vs *views) request(p transport.Peer, header []byte) {
	n := vs.node
	q := new(wire.CopyRequest)
	if err := wire.DecodeCopyRequest(header, q); err != nil {
		n.counters.BadMessages++
		return
	}
	if q.Kind == wire.CopyOpen {
		vs.begin(p, q)
		return
	}
	v := vs.open[q.View]
	switch {
	case v == nil || v.rep.key.Group != q.Group:
		if q.Kind != wire.CopyClose {
			vs.answer(p, &wire.CopyAnswer{ID: q.ID, Status: wire.CopyGone}, nil)
		}
	case q.Kind == wire.CopyClose:
		vs.end(v)
	case v.asks+v.paced >= maxViewAsks:
		vs.answer(p, &wire.CopyAnswer{ID: q.ID, Status: wire.CopyBusy}, nil)
	case q.Kind == wire.CopyScan:
		vs.scan(p, v, q)
	default:
		vs.data(p, v, q)
	}
}

func (vs *views) answer(p transport.Peer, a *wire.CopyAnswer, bufs []*payload.Buf) {
	m := transport.Message{Type: transport.TypeCopied, Header: wire.AppendCopyAnswer(nil, a), Payloads: bufs}
	if !p.Send(transport.Data, m) {
		vs.node.counters.Unsent++
	}
}

// begin opens a view once a checkpoint holds what the replica has applied.
func (vs *views) begin(p transport.Peer, q *wire.CopyRequest) {
	n := vs.node
	rep := n.replicas[q.Group]
	able := func() bool {
		if n.stopping || n.replicas[q.Group] != rep || rep == nil || rep.group == nil || rep.group.Err() != nil || rep.disk.failed != nil {
			return false
		}
		applied, _ := rep.state.Applied()
		return applied >= q.At && rep.key.Replica != q.Replica
	}
	refuse := func(st wire.CopyStatus) { vs.answer(p, &wire.CopyAnswer{ID: q.ID, Status: st}, nil) }
	switch {
	case !able():
		refuse(wire.CopyUnable)
		return
	case len(vs.open)+vs.begun >= maxViews:
		refuse(wire.CopyBusy)
		return
	}
	pin := func() {
		state := rep.state.View()
		if state == nil {
			refuse(wire.CopyUnable)
			return
		}
		vs.last++
		now := n.loop.Now()
		v := &view{id: vs.last, rep: rep, state: state, unpin: rep.disk.log.Pin(), since: now, used: now}
		vs.open[v.id] = v
		n.counters.CopyViews++
		vs.answer(p, &wire.CopyAnswer{ID: q.ID, Status: wire.CopyOK, View: v.id, Bytes: uint64(rep.state.DataBytes())}, nil)
	}
	if !rep.state.Unmerged() {
		pin()
		return
	}
	vs.begun++
	rep.disk.whenIdle(func() {
		if !able() {
			vs.begun--
			refuse(wire.CopyUnable)
			return
		}
		rep.disk.checkpoint([]*replica{rep}, func(err error) {
			vs.begun--
			if err != nil || !able() {
				refuse(wire.CopyUnable)
				return
			}
			pin()
		})
	})
}

// read does a view's reading off the loop.
func (vs *views) read(v *view, work, done func()) {
	v.asks++
	v.rep.disk.load(work, func() {
		v.asks--
		v.used = vs.node.loop.Now()
		done()
		if v.gone && v.asks == 0 {
			v.release()
		}
	})
}

func (vs *views) scan(p transport.Peer, v *view, q *wire.CopyRequest) {
	a := &wire.CopyAnswer{ID: q.ID, View: v.id, Status: wire.CopyOK}
	var err error
	vs.read(v, func() {
		var recs []index.Record
		recs, a.Next, err = v.state.Scan(q.From, q.To, wire.MaxCopyScanBytes)
		for _, r := range recs {
			a.Records = append(a.Records, wire.CopyRecord(r))
		}
	}, func() {
		if err != nil {
			vs.node.logf("group %d: a scan for a copy: %v", v.rep.key.Group, err)
			a = &wire.CopyAnswer{ID: q.ID, Status: wire.CopyFailed}
		}
		vs.answer(p, a, nil)
	})
}

// data reads blocks, at the pace that is set for copies.
func (vs *views) data(p transport.Peer, v *view, q *wire.CopyRequest) {
	n := vs.node
	blocks := 0
	for i := range q.Runs {
		blocks += int(q.Runs[i].Count)
	}
	now := n.loop.Now()
	wait := max(0, vs.next.Sub(now))
	vs.next = now.Add(wait + time.Duration(int64(blocks)*block.Size*int64(time.Second)/n.cfg.Pace.CopyBytes))
	v.paced++
	n.loop.After(wait, func() {
		v.paced--
		if v.gone || n.stopped {
			vs.answer(p, &wire.CopyAnswer{ID: q.ID, Status: wire.CopyGone}, nil)
			return
		}
		buf := payload.New(blocks * block.Size)
		log := v.rep.disk.log
		var err error
		vs.read(v, func() { err = readCopy(v.state, log, q.Runs, buf.Bytes()) }, func() {
			if err != nil {
				buf.Release()
				n.counters.CorruptReads++
				n.logf("group %d: a read for a copy: %v", v.rep.key.Group, err)
				vs.answer(p, &wire.CopyAnswer{ID: q.ID, Status: wire.CopyFailed}, nil)
				return
			}
			n.counters.CopyBytesOut += uint64(buf.Len())
			vs.answer(p, &wire.CopyAnswer{ID: q.ID, View: v.id, Status: wire.CopyOK}, []*payload.Buf{buf})
		})
	})
}

// readCopy reads runs of a view into dst, one after the other, and checks them.
// It blocks.
func readCopy(state *index.View, log *seglog.Log, runs []wire.CopyRun, dst []byte) error {
	for i := range runs {
		r := &runs[i]
		at, crcs, err := state.Place(r.Key, r.Skip, r.Count)
		if err != nil {
			return err
		}
		part := dst[:len(crcs)*block.Size]
		dst = dst[len(part):]
		if err := log.ReadBlocks(at, part); err != nil {
			return err
		}
		if block.FirstBadCRC(crcs, part) >= 0 {
			return block.Errorf(block.Corrupt, "%d blocks at %d.%d of the log fail their checksums", len(crcs), at.Segment, at.Block)
		}
	}
	return nil
}

// upkeep ends views that cost too much.
func (vs *views) upkeep(now clock.Instant) {
	for _, id := range sortedKeys(vs.open) {
		v := vs.open[id]
		d, age := v.rep.disk, now.Sub(v.since)
		switch {
		case d.failed != nil, age >= viewAge, v.asks+v.paced == 0 && now.Sub(v.used) >= viewIdle, age >= viewShort && d.log.Shortage():
			vs.end(v)
		}
	}
}

// end closes a view, once nothing reads it any more.
func (vs *views) end(v *view) {
	delete(vs.open, v.id)
	v.gone = true
	if v.asks == 0 {
		v.release()
	}
}

// endOf closes the views of one replica.
func (vs *views) endOf(rep *replica) {
	for _, id := range sortedKeys(vs.open) {
		if v := vs.open[id]; v.rep == rep {
			vs.end(v)
		}
	}
}

func (vs *views) endAll() {
	for _, id := range sortedKeys(vs.open) {
		vs.end(vs.open[id])
	}
}

func (v *view) release() {
	v.unpin()
	v.state.Release()
	v.rep.disk.log.Poke()
}
