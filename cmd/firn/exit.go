package main

import (
	"context"
	"errors"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"firn.io/firn/cluster/clusterpb"
	"firn.io/firn/internal/block"
)

// kindTable is the one place where error kinds meet exit codes and gRPC codes.
// Exit codes are for scripts and do not change. 0 is success, 1 an error
// without a kind, 2 a wrong command line.
var kindTable = map[block.Kind]struct {
	exit int
	code codes.Code
}{
	block.Internal:    {1, codes.Internal},
	block.Invalid:     {2, codes.InvalidArgument},
	block.NotFound:    {3, codes.NotFound},
	block.Exists:      {4, codes.AlreadyExists},
	block.Busy:        {5, codes.FailedPrecondition},
	block.Unavailable: {6, codes.Unavailable},
	block.NoSpace:     {7, codes.ResourceExhausted},
	block.ReadOnly:    {8, codes.FailedPrecondition},
	block.OutOfRange:  {9, codes.OutOfRange},
	block.Fenced:      {10, codes.Aborted},
	block.Corrupt:     {11, codes.DataLoss},
	block.Denied:      {12, codes.PermissionDenied},
	block.Unsupported: {13, codes.Unimplemented},
	block.Canceled:    {130, codes.Canceled},
}

// exitCode is what the process ends with on err.
func exitCode(err error) int {
	if err == nil {
		return 0
	}
	return kindTable[block.KindOf(err)].exit
}

// toStatus makes err a gRPC status that keeps its kind and text.
func toStatus(err error) error {
	if err == nil {
		return nil
	}
	kind := block.KindOf(err)
	switch {
	case kind != block.Internal:
	case errors.Is(err, context.Canceled):
		kind = block.Canceled
	case errors.Is(err, context.DeadlineExceeded):
		kind = block.Unavailable
	}
	st := status.New(kindTable[kind].code, err.Error())
	if detailed, e := st.WithDetails(&clusterpb.ErrorKind{Kind: uint32(kind)}); e == nil {
		st = detailed
	}
	return st.Err()
}

// fromStatus is toStatus's inverse, for what a call to addr returned.
func fromStatus(err error, addr string) error {
	if err == nil {
		return nil
	}
	st := status.Convert(err)
	for _, d := range st.Details() {
		if k, ok := d.(*clusterpb.ErrorKind); ok {
			return block.Errorf(block.Kind(k.Kind), "%s", st.Message())
		}
	}
	switch st.Code() {
	case codes.Unavailable:
		if strings.Contains(st.Message(), "server preface") {
			return block.Errorf(block.Unavailable, "%s takes connections and says nothing: a process that is starting or hangs, or one that is not firn; name the address of --api of a gateway with --api or FIRN_API", addr)
		}
		return block.Errorf(block.Unavailable, "no answer from %s (%s); start `firn up` or `firn gateway`, or name the right address with --api or FIRN_API",
			addr, st.Message())
	case codes.DeadlineExceeded:
		return block.Errorf(block.Unavailable, "no answer from %s in time; `firn health` may tell why, --timeout waits longer", addr)
	case codes.Canceled:
		return block.Errorf(block.Canceled, "interrupted")
	}
	return block.Wrap(block.Internal, err, "call to %s", addr)
}
