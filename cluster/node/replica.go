package node

import (
	"container/heap"
	"time"

	"firn.io/firn/cluster/index"
	"firn.io/firn/cluster/meta"
	"firn.io/firn/cluster/raftgroup"
	"firn.io/firn/cluster/seglog"
	"firn.io/firn/cluster/wire"
	"firn.io/firn/internal/block"
	"firn.io/firn/internal/clock"
)

// maxWait is how long a read waits for its token before it is answered "not
// ready", so that its gateway asks another replica.
const maxWait = time.Second

// replica is one replica of this node: its state, its log, and, once it is
// acknowledged and recovered, its part in the group.
type replica struct {
	node  *Node
	disk  *disk
	key   seglog.ReplicaKey
	state *index.Replica

	opening bool
	group   *raftgroup.Group // nil until open
	halted  error            // why it could not be opened

	waiting waiters
	waking  bool
	// dirtySince is when the oldest apply happened that no checkpoint has taken.
	dirtySince clock.Instant
	dirty      bool

	truncating bool
	// behind is what some member lacked at behindSince; 0: none did.
	behind      uint64
	behindSince clock.Instant

	layouts map[block.VolumeID]knownLayout
	disks   []block.DiskID // of all replicas of the group, from orders; nil: ask
}

// knownLayout is the layout version in the value that the group's record of a
// volume carries (S8), decoded once per record.
type knownLayout struct {
	epoch    block.Epoch
	settings block.SettingsCounter
	layout   block.LayoutVersion
}

func newReplica(d *disk, state *index.Replica) *replica {
	return &replica{node: d.node, disk: d, key: state.Key(), state: state, layouts: make(map[block.VolumeID]knownLayout)}
}

// wasOpen tells from what is on the disk whether the replica has been open
// before: then it was acknowledged (see orders).
func (rep *replica) wasOpen() bool {
	applied, _ := rep.state.Applied()
	return applied > raftgroup.InitialIndex || rep.log().HardState().Term > raftgroup.InitialTerm
}

func (rep *replica) log() replicaLog { return replicaLog{rep.disk.log.Replica(rep.key)} }

// open brings the replica into its group. It may be called again.
func (rep *replica) open() {
	n := rep.node
	if rep.opening || rep.group != nil || rep.halted != nil || rep.disk.failed != nil || n.stopping || n.replicas[rep.key.Group] != rep {
		return
	}
	if _, mixed := rep.state.Installing(); mixed || n.installs.all[rep.key.Group] != nil {
		n.installs.start(rep, 0, 0)
		return
	}
	if l := rep.disk.log.Replica(rep.key); l.Durable() < l.LastIndex() {
		n.loop.After(n.cfg.Pace.Upkeep, rep.open) // what it wrote before it was closed is on its way
		return
	}
	if n.opening(rep.key.Group) {
		n.loop.After(n.cfg.Pace.Upkeep, rep.open) // one that has lost the seat to this one
		return
	}
	rep.opening = true
	n.host.Open(raftgroup.GroupConfig{
		Group: rep.key.Group, Replica: rep.key.Replica, Disk: rep.disk.id, Log: rep.log(), Loop: rep.disk.loop, State: machine{rep},
		Behind: func(_ *raftgroup.Group, leader block.NodeID, at raftgroup.EntryID) {
			n.installs.behind(rep, leader, at.Index)
		},
		Failed: func(_ *raftgroup.Group, err error) { rep.halt(err) },
	}, func(g *raftgroup.Group, err error) {
		rep.opening = false
		switch {
		case err != nil:
			rep.halt(err)
		case rep.disk.failed != nil || n.stopped || n.replicas[rep.key.Group] != rep || rep.halted != nil:
			g.Close()
		default:
			rep.group = g
			rep.wake()
		}
	})
}

// halt takes note of a replica that does nothing any more.
func (rep *replica) halt(err error) {
	rep.halted = err
	rep.node.logf("group %d replica %d: %v", rep.key.Group, rep.key.Replica, err)
	rep.refuseWaiting()
	rep.node.orders.follow(rep.key.Group)
}

// trouble is why the replica does nothing, nil if it does.
func (rep *replica) trouble() error {
	if rep.halted == nil && rep.group != nil {
		return rep.group.Err()
	}
	return rep.halted
}

// damaged tells whether what the disk holds of the replica cannot be trusted
// (L4). A replica that halted because it does not know a command is not (S6).
func (rep *replica) damaged() bool {
	err := rep.trouble()
	return err != nil && block.KindOf(err) == block.Corrupt
}

// quarantine ends the part of a replica that was marked as damaged or lost.
func (rep *replica) quarantine() {
	if rep.halted == nil {
		rep.halt(block.Errorf(block.Corrupt, "it was found damaged or lost, and is replaced"))
	}
	rep.disk.confine(rep.key, rep.halted.Error())
	rep.node.installs.stop(rep)
	rep.close()
}

// retire takes the seat of its group from the replica.
func (rep *replica) retire() {
	n := rep.node
	n.installs.stop(rep)
	n.views.endOf(rep)
	rep.close()
	delete(n.replicas, rep.key.Group)
	n.retired[rep.key] = rep
}

// close ends the replica's part in its group.
func (rep *replica) close() {
	if rep.group != nil {
		rep.group.Close()
		rep.group = nil
	}
	rep.refuseWaiting()
}

func (rep *replica) version(index uint64) block.Version {
	return block.MakeVersion(rep.state.Era(), index)
}

// layout is the newest layout version of a volume that the group knows of.
func (rep *replica) layout(v block.VolumeID) block.LayoutVersion {
	rec, ok := rep.state.Record(v)
	if !ok || len(rec.VolumeValue) == 0 {
		return 0
	}
	known := rep.layouts[v]
	if known.epoch == rec.Epoch && known.settings == rec.Settings {
		return known.layout
	}
	known = knownLayout{epoch: rec.Epoch, settings: rec.Settings}
	if vm, err := meta.DecodeVolume(meta.KV{Key: meta.VolumeKey(v), Value: rec.VolumeValue}); err == nil {
		known.layout = vm.Layout
	}
	rep.layouts[v] = known
	return known.layout
}

// whenApplied runs fn once the replica has applied up to the token, at once if
// it has; it refuses o when that takes too long.
func (rep *replica) whenApplied(token block.Version, o *op, fn func()) {
	if rep.state.AppliedVersion() >= token {
		fn()
		return
	}
	heap.Push(&rep.waiting, waiter{token: token, op: o, fn: fn, since: rep.node.loop.Now()})
}

// applied is called after each apply.
func (rep *replica) applied() {
	if !rep.dirty {
		rep.dirty, rep.dirtySince = true, rep.node.loop.Now()
	}
	if len(rep.waiting) > 0 && !rep.waking {
		rep.waking = true
		rep.node.loop.Defer(rep.wake)
	}
}

func (rep *replica) wake() {
	rep.waking = false
	for len(rep.waiting) > 0 && rep.state.AppliedVersion() >= rep.waiting[0].token {
		heap.Pop(&rep.waiting).(waiter).fn()
	}
}

// expire refuses the reads that have waited too long.
func (rep *replica) expire(now clock.Instant) {
	var kept, late waiters
	for _, w := range rep.waiting {
		if now.Sub(w.since) >= maxWait {
			late = append(late, w)
		} else {
			kept = append(kept, w)
		}
	}
	if len(late) == 0 {
		return
	}
	heap.Init(&kept)
	rep.waiting = kept
	for _, w := range late {
		w.op.refuse(wire.StatusNotReady, "")
	}
}

func (rep *replica) refuseWaiting() {
	waiting := rep.waiting
	rep.waiting = nil
	for _, w := range waiting {
		w.op.refuse(wire.StatusNotReady, "")
	}
}

func (rep *replica) status() ReplicaStatus {
	log := rep.log()
	applied, _ := rep.state.Applied()
	s := ReplicaStatus{Group: rep.key.Group, Replica: rep.key.Replica, Disk: rep.disk.id, Open: rep.group != nil, Applied: applied,
		DurablyApplied: rep.state.DurablyApplied(), LogFirst: log.FirstIndex(), LogLast: log.LastIndex()}
	if rep.halted != nil {
		s.Failed = rep.halted.Error()
	}
	if in := rep.node.installs.all[rep.key.Group]; in != nil && in.rep == rep {
		s.Copy = in.status(rep.node.loop.Now())
	}
	if g := rep.group; g != nil {
		s.Leading, s.Term, s.Committed = g.Leading(), g.Term(), g.Committed()
		s.Leader, _, _ = g.Leader()
	}
	return s
}

// waiter is a read that waits for its token.
type waiter struct {
	token block.Version
	op    *op
	fn    func()
	since clock.Instant
}

// waiters is a heap by token.
type waiters []waiter

func (h waiters) Len() int           { return len(h) }
func (h waiters) Less(i, j int) bool { return h[i].token < h[j].token }
func (h waiters) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }

// Push implements heap.Interface.
func (h *waiters) Push(x any) { *h = append(*h, x.(waiter)) }

// Pop implements heap.Interface.
func (h *waiters) Pop() any {
	old := *h
	w := old[len(old)-1]
	old[len(old)-1] = waiter{}
	*h = old[:len(old)-1]
	return w
}

// machine is raftgroup's StateMachine over the index.
type machine struct{ rep *replica }

// Applied implements raftgroup.StateMachine.
func (m machine) Applied() raftgroup.EntryID {
	index, term := m.rep.state.Applied()
	return raftgroup.EntryID{Index: index, Term: term}
}

// Conf implements raftgroup.StateMachine.
func (m machine) Conf() []byte { return m.rep.state.Conf() }

// Apply implements raftgroup.StateMachine.
func (m machine) Apply(id raftgroup.EntryID, cmd *wire.Command) (wire.ApplyResult, error) {
	rep := m.rep
	var at seglog.Location
	if cmd.PayloadBytes > 0 {
		loc, _, ok := rep.disk.log.Replica(rep.key).Locate(id.Index)
		if !ok {
			return wire.ApplyResult{}, block.Errorf(block.Internal, "entry %d has a payload that the log does not place", id.Index)
		}
		at = loc
	}
	res, err := rep.state.Apply(id.Index, id.Term, cmd, at)
	if err == nil {
		rep.applied()
	}
	return res, err
}

// ApplyEmpty implements raftgroup.StateMachine.
func (m machine) ApplyEmpty(id raftgroup.EntryID) {
	mustFollow(m.rep.state.ApplyEmpty(id.Index, id.Term))
	m.rep.applied()
}

// ApplyConf implements raftgroup.StateMachine.
func (m machine) ApplyConf(id raftgroup.EntryID, conf []byte) {
	m.rep.disks = nil
	mustFollow(m.rep.state.ApplyConf(id.Index, id.Term, conf))
	m.rep.applied()
}

// mustFollow ends the process when raftgroup skipped an entry: a broken
// invariant of ours, past which every replica's state would be another.
func mustFollow(err error) {
	if err != nil {
		panic("node: " + err.Error())
	}
}
