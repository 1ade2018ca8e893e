package meta

import (
	"context"
	"slices"

	"firn.io/firn/internal/block"
)

// ReplaceReplica orders a new replica at a place instead of an old one, under an
// id that the group has never given out (C1). The order is decided on the
// members of conf and void on others (C2): then nothing is changed, and it is no
// error, nor if a replacement is under way already. The node there makes the
// replica; then the group's leader makes it a member and calls EndReplacement.
func ReplaceReplica(ctx context.Context, s Store, g Guard, id block.GroupID, conf uint64, old block.ReplicaID, at Place) error {
	return attempt(ctx, "replace a replica", func() (bool, error) {
		gm, kv, err := readGroup(ctx, s, id)
		if err != nil {
			return false, err
		}
		i := slices.IndexFunc(gm.Replicas, func(r ReplicaMeta) bool { return r.Replica == old })
		if i < 0 || gm.ConfVersion != conf || gm.Joining() {
			return true, nil
		}
		gm.Birth = gm.BirthMembers()
		for _, r := range gm.Replicas {
			gm.LastReplica = max(gm.LastReplica, r.Replica)
		}
		gm.LastReplica++
		gm.Replicas[i].Leaving = true
		gm.Replicas = append(gm.Replicas, ReplicaMeta{Node: at.Node, Disk: at.Disk, Replica: gm.LastReplica, Joining: true})
		done, _, err := guarded(ctx, s, "replace a replica", g, Txn{
			If: append(g.Conds(), Unchanged(kv)), Then: []Op{Put(kv.Key, EncodeGroup(gm), 0)}, Else: []Op{Read(ElectionKey)},
		})
		return done, err
	})
}

// AbandonReplacement gives the replacement up that joining belongs to, for a
// joining replica that was lost before it counted: the group's leader drops it
// and calls EndReplacement. It changes nothing, and is no error, if that is not
// the replacement under way.
func AbandonReplacement(ctx context.Context, s Store, g Guard, id block.GroupID, joining block.ReplicaID) error {
	return attempt(ctx, "give a replacement up", func() (bool, error) {
		gm, kv, err := readGroup(ctx, s, id)
		if err != nil {
			return false, err
		}
		i := slices.IndexFunc(gm.Replicas, func(r ReplicaMeta) bool { return r.Joining && r.Replica == joining })
		if i < 0 || gm.Replicas[i].GivenUp {
			return true, nil
		}
		gm.Replicas[i].GivenUp = true
		done, _, err := guarded(ctx, s, "give a replacement up", g, Txn{
			If: append(g.Conds(), Unchanged(kv)), Then: []Op{Put(kv.Key, EncodeGroup(gm), 0)}, Else: []Op{Read(ElectionKey)},
		})
		return done, err
	})
}

// Membership is the members of a group as its leader has applied them.
type Membership struct {
	// Index is the Raft index of the entry that decided them (C2).
	Index uint64
	// Last is the highest replica id that the group gave out.
	Last    block.ReplicaID
	Members []block.ReplicaID
}

// EndReplacement records, for the group's leader, how the replacement that
// joining belongs to ended. The leader knows that nothing of it can happen any
// more: of those that were joining or leaving, the ones in now are members for
// good, and the others never again: their nodes are told to remove what they
// hold. It changes nothing if the order is no longer the one of joining.
func EndReplacement(ctx context.Context, s Store, id block.GroupID, joining block.ReplicaID, now Membership) error {
	return attempt(ctx, "end a replacement", func() (bool, error) {
		gm, kv, err := readGroup(ctx, s, id)
		if err != nil {
			return false, err
		}
		if !slices.ContainsFunc(gm.Replicas, func(r ReplicaMeta) bool { return r.Joining && r.Replica == joining }) {
			return true, nil
		}
		if now.Index < gm.ConfVersion {
			return true, nil // the word of a leader whose time is over
		}
		var stay []ReplicaMeta
		for _, r := range gm.Replicas {
			member := !r.Joining && !r.Leaving || slices.Contains(now.Members, r.Replica)
			r.Joining, r.Leaving, r.GivenUp = false, false, false
			if member {
				stay = append(stay, r)
			} else {
				gm.Removed = append(gm.Removed, r)
			}
		}
		gm.Replicas = stay
		gm.Removed = gm.Removed[max(0, len(gm.Removed)-MaxRemoved):]
		gm.ConfVersion = now.Index
		gm.LastReplica = max(gm.LastReplica, now.Last)
		res, err := s.Txn(ctx, Txn{If: []Cond{Unchanged(kv)}, Then: []Op{Put(kv.Key, EncodeGroup(gm), 0)}})
		return res.Succeeded, err
	})
}

// ForgetReplica records, for its node, that nothing is left on the disk of a
// replica that was removed from its group. Repeating it is no error.
func ForgetReplica(ctx context.Context, s Store, id block.GroupID, r block.ReplicaID, disk block.DiskID) error {
	return attempt(ctx, "forget a removed replica", func() (bool, error) {
		gm, kv, err := readGroup(ctx, s, id)
		if err != nil {
			return false, err
		}
		had := len(gm.Removed)
		gm.Removed = slices.DeleteFunc(gm.Removed, func(m ReplicaMeta) bool { return m.Replica == r && m.Disk == disk })
		if len(gm.Removed) == had {
			return true, nil
		}
		res, err := s.Txn(ctx, Txn{If: []Cond{Unchanged(kv)}, Then: []Op{Put(kv.Key, EncodeGroup(gm), 0)}})
		return res.Succeeded, err
	})
}

func readGroup(ctx context.Context, s Store, id block.GroupID) (GroupMeta, KV, error) {
	kv, err := s.Get(ctx, GroupKey(id))
	if err != nil {
		return GroupMeta{}, kv, err
	}
	if !kv.Exists() {
		return GroupMeta{}, kv, block.Errorf(block.NotFound, "there is no group %d", id)
	}
	gm, err := DecodeGroup(kv)
	return gm, kv, err
}
