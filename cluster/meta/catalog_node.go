package meta

import (
	"context"
	"slices"

	"firn.io/firn/internal/block"
)

// Registration is what a node brings when it comes up.
type Registration struct {
	Node NodeMeta
	// Incarnation of this process, and the machine's boot id. The caller holds
	// the locks of all its disks' folders.
	Incarnation uint64
	Boot        string
	// HighestGroup is the highest group id among its replicas: the counter of
	// ids never hands it out again, even after a restore of the store.
	HighestGroup block.GroupID
}

// RegisterNode records the node and makes it live under lease, which is this
// process's. It is called at start and again for each new lease.
//
// Busy: another process with that id is alive. A process of the same boot that
// had the same disks cannot be alive, because the caller holds their locks: its
// key is replaced at once. Otherwise the caller tries again until the other's
// lease has ended, at most NodeTTL if it is dead.
//
// Failed flags in the store are kept (L8); the node's own are added. Disks that
// are known from before and were not brought are kept, marked Absent.
func RegisterNode(ctx context.Context, s Store, r Registration, lease LeaseID) (NodeMeta, error) {
	n := r.Node
	if n.ID == 0 || n.ID > MaxNodeID {
		return NodeMeta{}, block.Errorf(block.Invalid, "node id %d: use 1 to %d", n.ID, MaxNodeID)
	}
	live := LiveMeta{V: Format, Incarnation: r.Incarnation, Boot: r.Boot, Addr: n.Addr}
	for _, d := range n.Disks {
		live.Disks = append(live.Disks, d.ID)
	}
	for _, d := range n.Disks {
		if d.ID.IsZero() {
			return NodeMeta{}, block.Errorf(block.Invalid, "node %d registers a disk without an id", n.ID)
		}
	}
	var out NodeMeta
	err := attempt(ctx, "register the node", func() (bool, error) {
		liveKV, err := s.Get(ctx, LiveKey(n.ID))
		if err != nil {
			return false, err
		}
		if err := mayReplace(n.ID, liveKV, live); err != nil {
			return false, err
		}
		nodeKV, err := s.Get(ctx, NodeKey(n.ID))
		if err != nil {
			return false, err
		}
		out = n
		if nodeKV.Exists() {
			known, err := DecodeNode(nodeKV)
			if err != nil {
				return false, err
			}
			out.Disks = mergeDisks(n.Disks, known.Disks)
		}
		t := Txn{
			If: []Cond{Unchanged(liveKV), Unchanged(nodeKV)},
			Then: []Op{
				Put(LiveKey(n.ID), encode(live), lease),
				Put(NodeKey(n.ID), EncodeNode(out), 0),
			},
		}
		counter, err := s.Get(ctx, GroupCounterKey)
		if err != nil {
			return false, err
		}
		highest, err := decodeCounter(counter)
		if err != nil {
			return false, err
		}
		if uint64(r.HighestGroup) > highest {
			t.If = append(t.If, Unchanged(counter))
			t.Then = append(t.Then, Put(GroupCounterKey, encodeCounter(uint64(r.HighestGroup)), 0))
		}
		res, err := leased(ctx, s, t)
		return res.Succeeded, err
	})
	return out, err
}

func mayReplace(id block.NodeID, kv KV, mine LiveMeta) error {
	if !kv.Exists() {
		return nil
	}
	old, err := DecodeLive(kv)
	if err != nil {
		return err
	}
	if old.Incarnation == mine.Incarnation {
		return nil
	}
	if mine.Boot != "" && old.Boot == mine.Boot && len(old.Disks) > 0 && containsAll(mine.Disks, old.Disks) {
		return nil
	}
	return block.Errorf(block.Busy, "node %d is running already, at %s: give this one another id, or stop that one and wait %v", id, old.Addr, NodeTTL)
}

func containsAll(have, want []block.DiskID) bool {
	for _, d := range want {
		if !slices.Contains(have, d) {
			return false
		}
	}
	return true
}

func mergeDisks(now, known []DiskMeta) []DiskMeta {
	out := slices.Clone(now)
	for _, old := range known {
		i := slices.IndexFunc(out, func(d DiskMeta) bool { return d.ID == old.ID })
		if i < 0 {
			old.Absent = true
			out = append(out, old)
			continue
		}
		out[i].Failed = out[i].Failed || old.Failed
	}
	return out
}

// SetDiskFailed marks a disk as failed, for good (L8). NotFound if the node
// never registered it.
func SetDiskFailed(ctx context.Context, s Store, node block.NodeID, disk block.DiskID) error {
	return attempt(ctx, "mark the disk as failed", func() (bool, error) {
		kv, err := s.Get(ctx, NodeKey(node))
		if err != nil {
			return false, err
		}
		if !kv.Exists() {
			return false, block.Errorf(block.NotFound, "node %d never registered", node)
		}
		n, err := DecodeNode(kv)
		if err != nil {
			return false, err
		}
		i := slices.IndexFunc(n.Disks, func(d DiskMeta) bool { return d.ID == disk })
		if i < 0 {
			return false, block.Errorf(block.NotFound, "node %d has no disk %s", node, disk)
		}
		if n.Disks[i].Failed {
			return true, nil
		}
		n.Disks[i].Failed = true
		r, err := s.Txn(ctx, Txn{If: []Cond{Unchanged(kv)}, Then: []Op{Put(kv.Key, EncodeNode(n), 0)}})
		return r.Succeeded, err
	})
}

// RegisterGateway makes a gateway known under its lease, at start and again for
// each new lease. Busy: another process with that id is alive; one of the same
// boot and data folder, whose lock the caller holds, is replaced at once.
func RegisterGateway(ctx context.Context, s Store, g GatewayMeta, lease LeaseID) error {
	if err := CheckGatewayID(g.ID); err != nil {
		return err
	}
	g.V = Format
	return attempt(ctx, "register the gateway", func() (bool, error) {
		kv, err := s.Get(ctx, GatewayKey(g.ID))
		if err != nil {
			return false, err
		}
		if kv.Exists() {
			old, err := DecodeGateway(kv)
			if err != nil {
				return false, err
			}
			same := old.Incarnation == g.Incarnation || g.Folder != "" && g.Boot != "" && old.Folder == g.Folder && old.Boot == g.Boot
			if !same {
				return false, block.Errorf(block.Busy, "gateway %q is running already, at %s: give this one another id, or stop that one and wait %v", g.ID, old.Addr, OwnerTTL)
			}
		}
		r, err := leased(ctx, s, Txn{If: []Cond{Unchanged(kv)}, Then: []Op{Put(kv.Key, encode(g), lease)}})
		return r.Succeeded, err
	})
}

// AckReplicaCreated records that the replica is durable on its disk. Repeating
// it is no error. NotFound if the group does not name such a replica there, or
// is gone; then the replica is not to be kept. Invalid if it was marked lost.
func AckReplicaCreated(ctx context.Context, s Store, g block.GroupID, r block.ReplicaID, disk block.DiskID) error {
	return changeReplica(ctx, s, g, r, disk, func(_ *GroupMeta, m *ReplicaMeta) error {
		if m.Dead() {
			return block.Errorf(block.Invalid, "replica %d of group %d was lost; it never comes back under that id", r, g)
		}
		m.Created = true
		return nil
	})
}

// MarkReplicaLost records that a replica that was created is not on its disk
// any more (C1). It votes no more; the coordinator replaces it.
func MarkReplicaLost(ctx context.Context, s Store, g block.GroupID, r block.ReplicaID, disk block.DiskID) error {
	return changeReplica(ctx, s, g, r, disk, func(_ *GroupMeta, m *ReplicaMeta) error { m.Lost = true; return nil })
}

// MarkReplicaDamaged records that what its node found of a replica cannot be
// trusted (L4): it is in quarantine, and the coordinator replaces it. Busy, and
// nothing is recorded, if the members that are left would be no majority, those
// on disks that failed or are absent not counted: then the group needs this one
// more than it needs to be rid of it, and a later start of its node may find that
// it was well.
func MarkReplicaDamaged(ctx context.Context, s Store, g block.GroupID, r block.ReplicaID, disk block.DiskID) error {
	return changeReplica(ctx, s, g, r, disk, func(gm *GroupMeta, m *ReplicaMeta) error {
		if m.Damaged || m.Joining {
			m.Damaged = true
			return nil
		}
		m.Damaged = true
		well, members := gm.Well()
		for i := range gm.Replicas {
			if other := &gm.Replicas[i]; !other.Joining && !other.Dead() {
				out, err := diskIsOut(ctx, s, other.Node, other.Disk)
				if err != nil {
					return err
				}
				if out {
					well--
				}
			}
		}
		if 2*well <= members {
			return block.Errorf(block.Busy, "group %d has no majority without replica %d", g, r)
		}
		return nil
	})
}

// diskIsOut tells whether a node's disk failed, or was not there when the node
// came up last.
func diskIsOut(ctx context.Context, s Store, node block.NodeID, disk block.DiskID) (bool, error) {
	kv, err := s.Get(ctx, NodeKey(node))
	if err != nil || !kv.Exists() {
		return false, err
	}
	n, err := DecodeNode(kv)
	if err != nil {
		return false, err
	}
	return slices.ContainsFunc(n.Disks, func(d DiskMeta) bool { return d.ID == disk && (d.Failed || d.Absent) }), nil
}

func changeReplica(ctx context.Context, s Store, g block.GroupID, r block.ReplicaID, disk block.DiskID, change func(*GroupMeta, *ReplicaMeta) error) error {
	return attempt(ctx, "change a replica", func() (bool, error) {
		kv, err := s.Get(ctx, GroupKey(g))
		if err != nil {
			return false, err
		}
		if !kv.Exists() {
			return false, block.Errorf(block.NotFound, "there is no group %d", g)
		}
		gm, err := DecodeGroup(kv)
		if err != nil {
			return false, err
		}
		i := slices.IndexFunc(gm.Replicas, func(m ReplicaMeta) bool { return m.Replica == r && m.Disk == disk })
		if i < 0 {
			return false, block.Errorf(block.NotFound, "group %d has no replica %d on disk %s", g, r, disk)
		}
		was := gm.Replicas[i]
		if err := change(&gm, &gm.Replicas[i]); err != nil {
			return false, err
		}
		if gm.Replicas[i] == was {
			return true, nil
		}
		res, err := s.Txn(ctx, Txn{If: []Cond{Unchanged(kv)}, Then: []Op{Put(kv.Key, EncodeGroup(gm), 0)}})
		return res.Succeeded, err
	})
}
