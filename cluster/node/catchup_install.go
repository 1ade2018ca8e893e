package node

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"firn.io/firn/cluster/index"
	"firn.io/firn/cluster/raftgroup"
	"firn.io/firn/cluster/seglog"
	"firn.io/firn/cluster/transport"
	"firn.io/firn/cluster/wire"
	"firn.io/firn/internal/block"
	"firn.io/firn/internal/clock"
	"firn.io/firn/internal/loop"
	"firn.io/firn/internal/payload"
)

// Limits of what a node takes over for its replicas that are behind (C3).
const (
	// maxInstalls bounds the copies that run at once; others wait their turn.
	maxInstalls = 2
	// copyChunks is how many chunks are replaced in one batch.
	copyChunks = 8
	// copyAsks bounds the questions for data on their way: of 1 MiB each.
	copyAsks = 4
	// copyPatience is how long an answer may take, at the sender's pace.
	copyPatience = 10 * time.Second
	// copyPause is between two attempts.
	copyPause = 500 * time.Millisecond
)

// installs are the copies that this node's replicas take, or wait to take.
type installs struct {
	node    *Node
	all     map[block.GroupID]*install
	running int
	asks    map[uint64]*ask
	last    uint64
}

func newInstalls(n *Node) *installs {
	return &installs{node: n, all: make(map[block.GroupID]*install), asks: make(map[uint64]*ask)}
}

// ask is a question that waits for its answer.
type ask struct {
	in    *install
	timer loop.Timer
	done  func(*wire.CopyAnswer, *payload.Buf)
}

// install brings one replica to where another one is. The replica is closed
// meanwhile; once its state is a mixture it stays so until a copy is complete,
// over as many attempts, views and restarts as that takes.
//
// An attempt is a chain of steps, each of which starts the next. It ends in
// finish, or in fail, after which the next one begins with another sender.
type install struct {
	rep     *replica
	at      uint64         // the index that a view has to reach
	prefer  block.NodeID   // who to ask first, if known
	turn    int            // counts attempts
	attempt uint64         // names the one that runs, so that steps of an older one end
	active  bool           // counts as running
	sender  transport.Peer // of this attempt
	from    block.NodeID
	view    uint64
	copy    *index.Copy
	working bool          // a job of the copy, or a write of its data, is under way
	pending int           // questions of this step, and writes of what they brought
	next    int           // of copy.Needs, to be asked for
	began   clock.Instant // of replacing chunks, by this attempt
	bytes   int64
	total   int64  // about the data of the view
	trouble string // why the last attempt stopped, as it was logged
}

// behind takes a leader's word that the log no longer reaches a replica.
func (is *installs) behind(rep *replica, leader block.NodeID, at uint64) {
	if is.node.stopping || is.all[rep.key.Group] != nil || is.running >= maxInstalls {
		return // it is said again
	}
	is.start(rep, leader, at)
}

// start begins, or goes on with, the copy of a replica.
func (is *installs) start(rep *replica, leader block.NodeID, at uint64) {
	n := is.node
	if is.all[rep.key.Group] != nil {
		return
	}
	in := &install{rep: rep, prefer: leader, at: at}
	if target, mixed := rep.state.Installing(); mixed {
		in.at = max(in.at, target)
	}
	is.all[rep.key.Group] = in
	n.counters.Copies++
	n.logf("group %d replica %d is behind the log of its group: it is filled from another replica, from %d to %d or later",
		rep.key.Group, rep.key.Replica, rep.state.DurablyApplied(), in.at)
	rep.close()
	is.launch()
}

// launch lets those begin that wait, as far as the limit allows.
func (is *installs) launch() {
	if is.node.stopping {
		return
	}
	for _, id := range sortedKeys(is.all) {
		if in := is.all[id]; !in.active && is.running < maxInstalls {
			in.active = true
			is.running++
			in.drain()
		}
	}
}

// stop ends a copy without completing it: its replica or its disk goes away.
func (is *installs) stop(rep *replica) {
	in := is.all[rep.key.Group]
	if in == nil || in.rep != rep {
		return
	}
	in.end()
	is.remove(in)
}

func (is *installs) remove(in *install) {
	delete(is.all, in.rep.key.Group)
	if in.active {
		in.active = false
		is.running--
	}
	is.node.loop.Defer(is.launch)
}

func (is *installs) stopAll() {
	for _, id := range sortedKeys(is.all) {
		is.stop(is.all[id].rep)
	}
}

// lost says that a connection to a node is gone, and with it maybe what was
// asked or answered.
func (is *installs) lost(node block.NodeID) {
	for _, id := range sortedKeys(is.all) {
		if in := is.all[id]; in.from == node && in.sender != nil {
			in.failIf(in.attempt, "the connection is gone")
		}
	}
}

// answered takes the answer to a question.
func (is *installs) answered(m transport.Message) {
	a := new(wire.CopyAnswer)
	if err := wire.DecodeCopyAnswer(m.Header, a); err != nil {
		is.node.counters.BadMessages++
		m.Release()
		return
	}
	q := is.asks[a.ID]
	if q == nil {
		m.Release()
		return
	}
	delete(is.asks, a.ID)
	q.timer.Stop()
	var buf *payload.Buf
	if len(m.Payloads) == 1 {
		buf, m.Payloads = m.Payloads[0], nil
	}
	m.Release()
	q.done(a, buf)
}

// ask sends a question; done is called with its answer if the attempt still
// runs then, and takes over the payload. No answer, and any other than ok, ends
// the attempt.
func (in *install) ask(q *wire.CopyRequest, done func(*wire.CopyAnswer, *payload.Buf)) {
	n := in.rep.node
	is := n.installs
	is.last++
	q.ID, q.Group, q.View = is.last, in.rep.key.Group, in.view
	attempt := in.attempt
	w := &ask{in: in}
	w.timer = n.loop.After(copyPatience, func() {
		delete(is.asks, q.ID)
		in.failIf(attempt, "no answer within %v", copyPatience)
	})
	w.done = func(a *wire.CopyAnswer, buf *payload.Buf) {
		switch {
		case in.attempt != attempt:
		case a.Status != wire.CopyOK:
			in.failIf(attempt, "refused with status %d", a.Status)
		default:
			done(a, buf)
			return
		}
		if buf != nil {
			buf.Release()
		}
	}
	is.asks[q.ID] = w
	if !in.sender.Send(transport.Data, transport.Message{Type: transport.TypeCopy, Header: wire.AppendCopyRequest(nil, q)}) {
		n.loop.Post(func() { in.failIf(attempt, "the connection is gone") })
	}
}

// end lets go of what the attempt holds. A job of it that is under way is
// waited for by whoever begins the next.
func (in *install) end() {
	in.attempt++
	in.next, in.pending = 0, 0
	is := in.rep.node.installs
	for _, id := range sortedKeys(is.asks) {
		if q := is.asks[id]; q.in == in {
			q.timer.Stop()
			delete(is.asks, id)
		}
	}
	if in.view != 0 && in.sender != nil {
		q := wire.CopyRequest{Kind: wire.CopyClose, Group: in.rep.key.Group, View: in.view}
		in.sender.Send(transport.Data, transport.Message{Type: transport.TypeCopy, Header: wire.AppendCopyRequest(nil, &q)})
	}
	in.view, in.sender = 0, nil
	if c := in.copy; c != nil && !in.working {
		c.Abandon()
	}
	in.copy = nil
}

// failIf ends an attempt, if it still runs, and goes on with the next one; or,
// as long as nothing was changed, leaves the replica to its log.
func (in *install) failIf(attempt uint64, format string, args ...any) {
	n, rep := in.rep.node, in.rep
	if in.attempt != attempt || n.installs.all[rep.key.Group] != in {
		return
	}
	n.counters.CopyFailures++
	if why := fmt.Sprintf(format, args...); why != in.trouble {
		in.trouble = why
		n.logf("group %d replica %d: the copy from node %d stopped: %s", rep.key.Group, rep.key.Replica, in.from, why)
	}
	in.end()
	in.prefer = 0
	in.turn++
	if _, mixed := rep.state.Installing(); !mixed && !in.working {
		n.installs.remove(in)
		rep.open()
		return
	}
	attempt = in.attempt
	n.loop.After(copyPause, func() {
		if in.attempt == attempt {
			in.drain()
		}
	})
}

// over tells whether the step of an attempt has nothing to go on with.
func (in *install) over(attempt uint64) bool {
	return in.attempt != attempt || in.rep.disk.failed != nil || in.rep.node.stopping
}

// whenDrained runs fn once nothing of the replica is in memory alone.
func (in *install) whenDrained(whole bool, fn func()) {
	rep, d, attempt := in.rep, in.rep.disk, in.attempt
	ready := rep.state.Drained() && !(whole && rep.state.Unmerged())
	switch {
	case in.over(attempt):
	case in.working:
		in.later(func() { in.whenDrained(whole, fn) })
	case ready:
		fn()
	default:
		d.whenIdle(func() {
			if in.over(attempt) {
				return
			}
			d.checkpoint([]*replica{rep}, func(err error) {
				if err == nil && !in.over(attempt) {
					in.whenDrained(whole, fn)
				}
			})
		})
	}
}

// later runs fn at the next tick of upkeep, if the attempt still runs.
func (in *install) later(fn func()) {
	attempt := in.attempt
	in.rep.node.loop.After(in.rep.node.cfg.Pace.Upkeep, func() {
		if !in.over(attempt) {
			fn()
		}
	})
}

// drain makes what was applied durable: M.
func (in *install) drain() {
	if _, mixed := in.rep.state.Installing(); mixed {
		in.whenDrained(false, in.open)
		return
	}
	in.whenDrained(true, func() {
		applied, _ := in.rep.state.Applied()
		if in.rep.state.DurablyApplied() == applied {
			in.open()
			return
		}
		d, attempt := in.rep.disk, in.attempt
		d.whenIdle(func() {
			if !in.over(attempt) {
				d.checkpoint(nil, func(err error) {
					if err == nil && !in.over(attempt) {
						in.open()
					}
				})
			}
		})
	})
}

// senders are the nodes of the other members, as far as known, in an order
// that each attempt begins elsewhere.
func (in *install) senders() []block.NodeID {
	n, self := in.rep.node, in.rep.node.cfg.ID
	var ids []block.NodeID
	add := func(id block.NodeID) {
		if id != 0 && id != self && !slices.Contains(ids, id) {
			ids = append(ids, id)
		}
	}
	add(in.prefer)
	if g, ok := n.orders.groups[in.rep.key.Group]; ok {
		for _, r := range g.Replicas {
			if !r.Dead() {
				add(r.Node)
			}
		}
	}
	if conf, err := raftgroup.DecodeConf(in.rep.state.Conf()); err == nil {
		for _, m := range conf.Members {
			add(m.Node)
		}
	}
	return ids
}

// open asks for a view.
func (in *install) open() {
	n, attempt := in.rep.node, in.attempt
	ids := in.senders()
	if len(ids) == 0 {
		in.failIf(attempt, "no other replica is known")
		return
	}
	in.from = ids[in.turn%len(ids)]
	if in.sender = n.peers.Peer(in.from); in.sender == nil {
		in.failIf(attempt, "its address is not known")
		return
	}
	in.ask(&wire.CopyRequest{Kind: wire.CopyOpen, Replica: in.rep.key.Replica, At: in.at}, func(a *wire.CopyAnswer, buf *payload.Buf) {
		drop(buf)
		in.view, in.total, in.bytes, in.began = a.View, int64(a.Bytes), 0, 0
		in.copy = in.rep.state.NewCopy()
		from, to := index.HeadRange()
		in.scan(from, to, in.copy.Head, in.head)
	})
}

func drop(buf *payload.Buf) {
	if buf != nil {
		buf.Release()
	}
}

// scan takes all records of a range, page by page, then calls done.
func (in *install) scan(from, to []byte, take func([]index.Record) error, done func()) {
	attempt := in.attempt
	in.ask(&wire.CopyRequest{Kind: wire.CopyScan, From: from, To: to}, func(a *wire.CopyAnswer, buf *payload.Buf) {
		drop(buf)
		recs := make([]index.Record, len(a.Records))
		for i, r := range a.Records {
			recs[i] = index.Record(r)
		}
		switch err := take(recs); {
		case err != nil:
			in.failIf(attempt, "%v", err)
		case a.Next == nil:
			done()
		case len(recs) == 0:
			in.failIf(attempt, "a page without records")
		default:
			in.scan(a.Next, to, take, done)
		}
	})
}

// head checks what the view is of.
func (in *install) head() {
	attempt := in.attempt
	at, _, members, err := in.copy.HeadDone()
	if err == nil {
		var conf raftgroup.Conf
		if conf, err = raftgroup.DecodeConf(members); err == nil {
			if _, ok := conf.NodeOf(in.rep.key.Replica); !ok {
				err = block.Errorf(block.Unavailable, "its members at %d are without this replica", at)
			}
		}
	}
	if err == nil && at < in.at {
		err = block.Errorf(block.Unavailable, "its view is at %d, it has to be at %d", at, in.at)
	}
	if err != nil {
		in.failIf(attempt, "%v", err)
		return
	}
	from, to := index.TableRange()
	in.scan(from, to, in.copy.Table, func() {
		in.copy.TableDone()
		in.whenDrained(false, func() { in.run(in.copy.Begin(), in.chunks) })
	})
}

// run does a job of the copy. An error is the disk's end (L8).
func (in *install) run(job *index.Job, done func()) {
	attempt, c := in.attempt, in.copy
	in.working = true
	in.rep.disk.background(job, func(err error) {
		in.working = false
		switch {
		case err != nil:
		case in.attempt != attempt:
			c.Abandon()
		case !in.over(attempt):
			done()
		}
	})
}

// chunks goes on with the next few.
func (in *install) chunks() {
	c, attempt := in.copy, in.attempt
	if in.began == 0 {
		in.began = in.rep.node.loop.Now()
	}
	ids := c.Next(copyChunks)
	if c.Ended() {
		in.whenDrained(false, in.finish)
		return
	}
	in.pending = len(ids) + 1
	arrived := func() {
		if in.pending--; in.pending == 0 && !in.over(attempt) {
			in.whenDrained(false, func() { in.run(c.Compare(), in.fetch) })
		}
	}
	for _, id := range ids {
		from, to := id.Range()
		in.scan(from, to, func(recs []index.Record) error { return c.Extents(id, recs) }, arrived)
	}
	arrived()
}

// fetch asks for the data that the chunks lack.
func (in *install) fetch() {
	in.next, in.pending = 0, 0
	in.fetchMore()
}

func (in *install) fetchMore() {
	c, attempt := in.copy, in.attempt
	needs := c.Needs()
	for in.next < len(needs) && in.pending < copyAsks {
		if !in.rep.disk.roomForCopy() {
			in.rep.disk.needSpace = true
			if in.pending == 0 {
				in.later(in.fetchMore)
			}
			return
		}
		from, blocks := in.next, 0
		q := &wire.CopyRequest{Kind: wire.CopyData}
		for in.next < len(needs) && len(q.Runs) < wire.MaxCopyRuns && blocks+len(needs[in.next].Record.CRCs) <= wire.MaxCopyBlocks {
			need := &needs[in.next]
			q.Runs = append(q.Runs, wire.CopyRun{Key: need.Key, Skip: need.Skip, Count: uint8(len(need.Record.CRCs))})
			blocks += len(need.Record.CRCs)
			in.next++
		}
		part := needs[from:in.next]
		in.pending++
		in.ask(q, func(_ *wire.CopyAnswer, buf *payload.Buf) { in.store(part, blocks, buf) })
	}
	if in.pending == 0 && in.next == len(needs) && !in.over(attempt) {
		in.whenDrained(false, func() { in.run(c.Replace(), in.chunks) })
	}
}

// store checks what came and puts it on the disk.
func (in *install) store(part []index.Need, blocks int, buf *payload.Buf) {
	n, c, attempt := in.rep.node, in.copy, in.attempt
	if buf == nil || buf.Len() != blocks*block.Size {
		drop(buf)
		in.failIf(attempt, "data that was not asked for")
		return
	}
	moves := make([]seglog.Move, len(part))
	bytes := buf.Bytes()
	for i := range part {
		moves[i].Record = part[i].Record
		size := len(part[i].Record.CRCs) * block.Size
		if block.FirstBadCRC(part[i].Record.CRCs, bytes[:size]) >= 0 {
			buf.Release()
			n.counters.CorruptReads++
			in.failIf(attempt, "blocks that fail their checksums (volume %v, chunk %d)", part[i].Record.Volume, part[i].Record.Chunk)
			return
		}
		bytes = bytes[size:]
	}
	placed := 0
	in.rep.disk.log.Store(moves, buf.Bytes(), func(ms []seglog.Move) {
		for i := range ms {
			if in.attempt == attempt {
				c.Placed(&part[placed], 0, len(ms[i].CRCs), ms[i].To)
			}
			placed++
		}
	}, func(err error) {
		buf.Release()
		if err != nil || in.over(attempt) {
			return
		}
		n.counters.CopyBytesIn += uint64(blocks * block.Size)
		in.bytes += int64(blocks * block.Size)
		in.pending--
		in.fetchMore()
	})
}

// finish sets the rest to what the view has, and opens the replica again once
// that is durable.
func (in *install) finish() {
	rep, d, n, attempt := in.rep, in.rep.disk, in.rep.node, in.attempt
	in.run(in.copy.Finish(), func() {
		d.whenIdle(func() {
			if in.over(attempt) {
				return
			}
			d.checkpoint(nil, func(err error) {
				if err != nil || in.over(attempt) {
					return
				}
				applied, _ := rep.state.Applied()
				_, total := in.copy.Chunks()
				n.counters.CopiesDone++
				n.logf("group %d replica %d has the state at %d from node %d: %d chunks, %d bytes of data", rep.key.Group, rep.key.Replica, applied, in.from, total, in.bytes)
				in.copy = nil
				in.end()
				n.installs.remove(in)
				rep.dirty, rep.layouts = false, make(map[block.VolumeID]knownLayout)
				rep.open()
			})
		})
	})
}

// CopyStatus says how far the copy of a replica is that was behind its log.
type CopyStatus struct {
	// From is the node that it is taken from; 0 while the copy waits.
	From block.NodeID
	// Done of Total chunks are as they should be. Total is 0 until the chunk
	// tables were compared.
	Done, Total int
	// Bytes of data have come, of about TotalBytes.
	Bytes, TotalBytes int64
	// Left is the time that it will take at the pace until now; 0: not known.
	Left time.Duration
}

func (in *install) status(now clock.Instant) *CopyStatus {
	s := &CopyStatus{Bytes: in.bytes}
	if in.view == 0 || in.copy == nil {
		return s
	}
	s.From = in.from
	s.Done, s.Total = in.copy.Chunks()
	s.TotalBytes = in.total
	if in.began != 0 && s.Done > 0 {
		s.Left = now.Sub(in.began) / time.Duration(s.Done) * time.Duration(s.Total-s.Done)
		s.TotalBytes = in.bytes * int64(s.Total) / int64(s.Done)
	}
	return s
}

// background does a job of a copy beside the disk's chain of jobs: the replica
// has no other. An error is the disk's end (L8).
func (d *disk) background(job *index.Job, done func(error)) {
	d.work(loop.Merge, job.Run, func() {
		err := cmp.Or(d.failed, job.Finish())
		if err != nil {
			d.fail(err)
		}
		done(err)
	})
}

// roomForCopy tells whether the disk takes more data of other replicas: as
// long as clients may write, and collection keeps the segments that it needs.
func (d *disk) roomForCopy() bool {
	return d.taken()*100 < d.room()*refusePercent && d.log.Space().FreeBytes > reserveSegments*d.sb.SegmentBytes
}

// slowestPatience is how long the log waits, above its cap, for a member that
// lacks entries, before it lets go of them: that member is filled from chunk
// tables then.
const slowestPatience = 2 * time.Second

// truncatable is the index up to which the replica's log is not needed (L7):
// what every member has, or, when the logs of the disk claim more than they may,
// what was durable slowestPatience ago. A member that is down, or slow for good,
// does not fill the disks of the others.
func (rep *replica) truncatable(pressed bool) uint64 {
	durable := rep.state.DurablyApplied()
	if conf := rep.group.Conf(); len(conf.Members) <= 1 {
		return durable
	}
	now, slowest := rep.node.loop.Now(), min(durable, rep.group.SlowestMatch())
	switch {
	case slowest == durable:
		rep.behind = 0
	case rep.behind <= slowest:
		rep.behind, rep.behindSince = durable, now
	case pressed && now.Sub(rep.behindSince) >= slowestPatience:
		upTo := min(rep.behind, durable)
		if rep.log().FirstIndex() > upTo { // done; the next round
			rep.behind, rep.behindSince = durable, now
		}
		return upTo
	}
	return slowest
}
