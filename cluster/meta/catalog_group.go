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

// EndReplacement records, for the group's leader, how the replacement that was
// decided on the members of conf ended: with the members of now, under which
// the joining replica took the place of the leaving one, or, if not done, that
// it is void. last is the highest replica id that the group gave out. It changes
// nothing if the order is no longer the one of joining.
func EndReplacement(ctx context.Context, s Store, id block.GroupID, joining block.ReplicaID, now uint64, last block.ReplicaID, done bool) error {
	return attempt(ctx, "end a replacement", func() (bool, error) {
		gm, kv, err := readGroup(ctx, s, id)
		if err != nil {
			return false, err
		}
		if !slices.ContainsFunc(gm.Replicas, func(r ReplicaMeta) bool { return r.Joining && r.Replica == joining }) {
			return true, nil
		}
		if now < gm.ConfVersion {
			return true, nil // the word of a leader whose time is over
		}
		gm.Replicas = slices.DeleteFunc(gm.Replicas, func(r ReplicaMeta) bool {
			return done && r.Leaving || !done && r.Joining
		})
		for i := range gm.Replicas {
			gm.Replicas[i].Joining, gm.Replicas[i].Leaving = false, false
		}
		gm.ConfVersion = now
		gm.LastReplica = max(gm.LastReplica, last)
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
