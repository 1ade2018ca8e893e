package raftgroup

import "fmt"

// logger passes on what Raft says to people. What it says at each election and
// each lost message stays unsaid; Panicf and Fatalf are its assertions.
type logger struct{ g *Group }

func (logger) Debug(...any)          {}
func (logger) Debugf(string, ...any) {}
func (logger) Info(...any)           {}
func (logger) Infof(string, ...any)  {}

func (l logger) Warning(v ...any)            { l.say(fmt.Sprint(v...)) }
func (l logger) Warningf(f string, v ...any) { l.say(fmt.Sprintf(f, v...)) }
func (l logger) Error(v ...any)              { l.say(fmt.Sprint(v...)) }
func (l logger) Errorf(f string, v ...any)   { l.say(fmt.Sprintf(f, v...)) }
func (l logger) Fatal(v ...any)              { l.broken(fmt.Sprint(v...)) }
func (l logger) Fatalf(f string, v ...any)   { l.broken(fmt.Sprintf(f, v...)) }
func (l logger) Panic(v ...any)              { l.broken(fmt.Sprint(v...)) }
func (l logger) Panicf(f string, v ...any)   { l.broken(fmt.Sprintf(f, v...)) }
func (l logger) say(text string)             { l.g.host.cfg.Logf("group %d: %s", l.g.cfg.Group, text) }
func (l logger) broken(text string)          { panic(fmt.Sprintf("raft group %d: %s", l.g.cfg.Group, text)) }
