#!lua flags=allow-oom
-- Publishes many messages in one command: a pipeline of single PUBLISHes takes several times as long.
--
-- ARGV[1] channel   ARGV[2…] messages

for i = 2, #ARGV do redis.call('PUBLISH', ARGV[1], ARGV[i]) end
return #ARGV - 1
